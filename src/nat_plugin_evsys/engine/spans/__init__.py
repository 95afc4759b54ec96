"""The fast decoder."""
