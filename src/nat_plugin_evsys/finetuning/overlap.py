"""Which weights sample the rollouts that overlap with training.

Epoch e's rollouts start when those of epoch e-1 have ended, before training on these: they sample from what the run had
after e-1 epochs, less one. A resumed run finds epoch e-1 trained, and takes the weights of the checkpoint before.
"""

from __future__ import annotations

import logging

from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.runs import RunDirectory

logger = logging.getLogger(__name__)


def hold_next_rollouts(policy: Policy) -> None:
    """For the rollouts that start now.

    Calls sample from the newest weights, so those that rollouts make after the training has ended are fresh. How many
    these are is a matter of time, so a deterministic policy samples all of an epoch's calls from the same weights.
    """
    if policy.config.deterministic:
        policy.hold_rollouts()


async def hold_resumed_rollouts(policy: Policy, run: RunDirectory) -> None:
    """For the first rollouts of a resumed run, so that they are as old as those of a run that was never interrupted."""
    before = run.state.epochs_done - 1
    record = next((each for each in run.state.checkpoints if each.epoch == before), None)
    if record is None:
        if before >= 0:
            logger.warning("no checkpoint of epoch %d is left, so the first rollouts are fresh", before)
        return
    try:
        await policy.hold_rollouts_at(run.locate(record.adapter))
    except CheckpointError as error:
        logger.warning(
            "the checkpoint of epoch %d cannot be loaded, so the first rollouts are fresh: %s", before, error
        )
