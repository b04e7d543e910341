"""Registering the best checkpoint, promotion, and reading the registry."""
