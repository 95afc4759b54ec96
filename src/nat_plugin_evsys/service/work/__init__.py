"""Turns, execution and the models in memory."""
