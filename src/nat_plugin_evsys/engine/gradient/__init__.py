"""Datums -> loss -> gradient -> step."""
