"""Checkpoints: one format for every world size, committed or absent.

`slices.py` copies a rank's share out of the engine and back, `writing.py` puts it on storage and commits it,
`reading.py` finds what is committed and reads any slice of it, `retention.py` decides what may go.
"""
