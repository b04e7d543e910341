"""The data stage as Ray tasks."""
