"""Evaluators that ship with the package: rewards that need no judge."""
