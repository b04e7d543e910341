"""Numerical self-tests of a job's model, task and attention backend on a few of its own rows. Begin at `verify.py`."""
