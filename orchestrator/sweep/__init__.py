"""Sweeps: many runs of one job with other values, the best of which is registered. Begin at `sweep.py`."""
