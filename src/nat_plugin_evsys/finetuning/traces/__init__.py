"""Learning from recorded trajectories."""
