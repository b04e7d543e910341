"""A storage folder with an empty registry."""

from tests.orchestrator.registry.conftest import empty_database, storage

__all__ = ["empty_database", "storage"]
