"""Ray in tests: nothing is sent home, and a machine that is full for a moment does not cost a replica."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
