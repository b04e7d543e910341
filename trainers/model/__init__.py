"""Loading the model and building the DeepSpeed engine."""
