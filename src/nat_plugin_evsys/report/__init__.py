"""What a run shows: metrics, reward plot, progress display and summary."""
