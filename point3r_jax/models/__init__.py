"""Networks only: no I/O, no loop over frames, no sharding."""
