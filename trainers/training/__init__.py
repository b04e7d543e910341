"""The training loop and what decides inside it."""
