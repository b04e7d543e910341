"""Everything that knows Ray: the controller and its stages, and the command line.

Begin reading at `run.py`: the main job is five lines there.
"""

from trainers import __version__

__all__ = ["__version__"]
