"""Which sequences make which step: mixture, packing, order, micro-batches."""
