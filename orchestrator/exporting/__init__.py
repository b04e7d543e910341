"""`tuneyard export`: a model folder, its adapters alone, or a quantized model that the evaluation rows let pass."""
