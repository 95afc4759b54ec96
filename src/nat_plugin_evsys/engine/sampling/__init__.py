"""The plain decoder: a sampling request until its last token."""
