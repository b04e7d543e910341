"""Metrics, from the reference libraries."""
