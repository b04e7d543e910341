"""The training stage: the controller decides, node agents start and watch the ranks."""
