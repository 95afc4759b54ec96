"""A request until its last token."""
