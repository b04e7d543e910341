"""Launcher-agnostic training: a job file and Arrow shards in, committed checkpoints out.

Nothing in this package knows Ray. Begin at `job.py` (what the user asks for), then `loop.py` (what a rank does).
"""

__version__ = "0.1.0"
