"""Conversations: reading them, writing them with the model's template, and which tokens the assistant says."""
