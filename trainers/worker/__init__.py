"""One rank: its life from launch to exit, and how the node agent sees it."""
