"""Tic-tac-toe against a fixed opponent."""
