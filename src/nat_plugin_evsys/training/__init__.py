"""Everything that takes optimizer steps."""
