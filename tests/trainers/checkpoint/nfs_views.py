"""What runs on NFS: see `test_choosing.py`."""

import sys
from pathlib import Path

from tests.trainers.checkpoint.test_choosing import follow_rank_0

if __name__ == "__main__":
    follow_rank_0(*map(Path, sys.argv[1:]))
    print("followed")
