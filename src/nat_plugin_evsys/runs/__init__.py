"""Runs on disk: the run directory, its state, and the checkpoints that it names.

Standard library and PyYAML only, so that serving a checkpoint can locate it without importing the trainer.
"""

from nat_plugin_evsys.runs.checkpoints import is_service_path, newer_runs_notice, resolve_checkpoint
from nat_plugin_evsys.runs.directory import RunDirectory
from nat_plugin_evsys.runs.latest import LatestRun, latest_to_serve, latest_to_show
from nat_plugin_evsys.runs.policies import further_policies, policy_directory
from nat_plugin_evsys.runs.settings import changed_settings, redact
from nat_plugin_evsys.runs.state import CheckpointRecord, RunState

__all__ = [
    "CheckpointRecord",
    "LatestRun",
    "RunDirectory",
    "RunState",
    "changed_settings",
    "further_policies",
    "is_service_path",
    "latest_to_serve",
    "latest_to_show",
    "newer_runs_notice",
    "policy_directory",
    "redact",
    "resolve_checkpoint",
]
