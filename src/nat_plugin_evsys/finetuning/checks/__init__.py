"""Whether a run can train: by its configuration, and by what its rollouts came to."""
