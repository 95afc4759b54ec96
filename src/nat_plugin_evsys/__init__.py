"""Reinforcement finetuning for any NeMo Agent Toolkit workflow. See README.md."""

__version__ = "0.1.0"
