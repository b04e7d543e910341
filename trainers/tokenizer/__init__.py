"""Text to token ids, in bulk, checked against the reference tokenizer."""
