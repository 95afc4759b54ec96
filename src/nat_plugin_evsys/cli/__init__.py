"""``nat evsys …``."""
