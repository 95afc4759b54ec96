"""Recorded calls -> episodes -> trajectories -> groups -> advantages -> Datums. Pure functions."""
