"""Runs on disk: the run directory, its state, and the checkpoints that it names.

Standard library and PyYAML only, so that serving a checkpoint can locate it without importing the trainer.
"""

from nat_plugin_evsys.runs.checkpoints import is_service_path, resolve_checkpoint
from nat_plugin_evsys.runs.directory import RunDirectory
from nat_plugin_evsys.runs.settings import changed_settings, redact
from nat_plugin_evsys.runs.state import CheckpointRecord, RunState

__all__ = [
    "CheckpointRecord",
    "RunDirectory",
    "RunState",
    "changed_settings",
    "is_service_path",
    "redact",
    "resolve_checkpoint",
]
