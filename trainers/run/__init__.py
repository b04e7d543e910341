"""A run on storage: its record, folder, events and log."""
