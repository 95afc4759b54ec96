"""The journal of operations and the catalog."""
