"""A plan carried out: the last checks, then pieces copied or assigned into a model's memory."""
