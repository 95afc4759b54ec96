"""The engine's clients in this process: Tinker's API, and what Loops and Weaver add to it. See docs/api.md."""
