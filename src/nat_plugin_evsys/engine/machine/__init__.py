"""What this computer has: memory, allocator, products."""
