"""Checkpoints: one format for every world size, committed or absent.

Saving: `slices.py` knows a rank's share of the engine's state, `host_buffer.py` copies it to shared memory,
`writer_link.py` hands it to the process of `writer.py`, which puts it on storage and commits it (`writing.py`).
Resuming: in `choosing.py` rank 0 decides on a checkpoint and all ranks check it (`damage.py`); `reading.py` reads any
slice of it. `retention.py` decides what may go, `cleaning.py` removes it. `checkpointer.py` joins them for the loop:
begin there. `export.py` makes a checkpoint a model folder, under the names that a model is published with.
"""
