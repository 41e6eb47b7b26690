"""Point3R in JAX: streaming 3D reconstruction with a pointer memory."""
