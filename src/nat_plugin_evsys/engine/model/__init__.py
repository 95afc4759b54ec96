"""The frozen base model and its LoRA adapter."""
