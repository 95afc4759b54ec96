"""The LoRA engine: torch only; it knows nothing of NAT, HTTP or rewards."""
