"""Evaluations as Ray tasks beside the training, and the choice of the best."""
