"""LoRA adapters that are kept apart from the weights."""
