"""Who follows a run while it goes on: MLflow, Weights & Biases, a web hook; from a process beside the driver."""
