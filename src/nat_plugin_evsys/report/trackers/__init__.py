"""Experiment trackers: each in a module of its own, which is imported when the YAML names it."""
