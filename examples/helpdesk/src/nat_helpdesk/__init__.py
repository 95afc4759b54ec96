"""A help desk agent to learn on: one tool, four teams."""
