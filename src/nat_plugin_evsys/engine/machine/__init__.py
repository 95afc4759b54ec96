"""This computer: memory, allocator, matrix products."""
