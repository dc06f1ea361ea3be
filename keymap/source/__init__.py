"""From a path to a state dict of a known format: which file, which dict in it, which format, which settings."""
