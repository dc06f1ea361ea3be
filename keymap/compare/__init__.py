"""Compare two checkpoints: bring both to the same names, then compare tensor by tensor."""
