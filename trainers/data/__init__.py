"""Rows to sequences: sources, readers, shards, packing and the order in which training sees them."""
