"""Scoring a model on the evaluation shards."""
