"""The plan's memory beside that of real ranks: `bench_memory.py`."""
