"""Execute a plan: run the last checks, then copy or assign the pieces into the model."""
