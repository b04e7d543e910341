"""Jobs on a cluster through Ray Jobs: sending them, looking after those that were sent."""
