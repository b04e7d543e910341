"""Everything that is known before a worker is taken."""
