"""Arrow shards: written, described, found again and read."""
