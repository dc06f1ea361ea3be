"""Carry a plan out: the last checks, then the pieces are copied or assigned into the model."""
