"""The LoRA engine: torch only, independent of NAT, HTTP and rewards."""
