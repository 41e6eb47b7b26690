"""The published protocols: sequences in, metrics and reports out."""
