"""A run's output: metrics, reward plot, progress display, report and summary."""
