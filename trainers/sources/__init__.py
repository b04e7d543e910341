"""Where rows come from: files, buckets, the hub, and their formats."""
