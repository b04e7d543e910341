"""`python -m trainers.worker fork|become` is the rank server. While it imports, nothing is searched for cycles."""

import gc
import sys
from typing import get_args

gc.disable()  # until `rank_server.main` has imported the rest

from trainers.worker.rank_server import main  # noqa: E402
from trainers.worker.rank_spec import Mode  # noqa: E402

assert sys.argv[1] in get_args(Mode)
main("fork" if sys.argv[1] == "fork" else "become")
