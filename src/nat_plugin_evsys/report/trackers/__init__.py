"""Experiment trackers, each in its own module, which is imported only if the YAML names it."""
