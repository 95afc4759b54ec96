"""Whether anything can be learned or reported from a batch of rollouts; if not, why not, and what to type."""

from __future__ import annotations

from collections.abc import Mapping

from nat_plugin_evsys.errors import RolloutsFailedError
from nat_plugin_evsys.rollouts.attempts import Attempt

_OWN_CLIENT = (
    "read `endpoint = policy_endpoint()` (`from nat_plugin_evsys import policy_endpoint`) inside the workflow's "
    "function, and give its `base_url` and `api_key` to the client, or its `headers` to each request (docs/agents.md)"
)


def check_batch(
    attempts: list[Attempt], name: str, policy_name: str, *, unattributed: int = 0, all_may_fail: bool = True
) -> None:
    """Refuse rollouts of which not one has both a reward and a call.

    Args:
        name: of these rollouts.
        policy_name: what ``llms:`` calls the policy.
        unattributed: calls that reached the policy meanwhile and belong to no rollout.
        all_may_fail: False refuses rollouts that all failed with the same reward, too.

    Raises:
        RolloutsFailedError: nothing can be learned from them; the message has the first cause and what to type.
    """
    if not attempts:
        raise RolloutsFailedError(
            f"{name}: the dataset has no rows, so there are no rollouts: its `custom` function or its remote file gave "
            "none, or its filter leaves none. Run `nat eval` on the same config to see it alone"
        )
    if all(attempt.lost for attempt in attempts):
        first = attempts[0]
        raise RolloutsFailedError(
            f"none of the {len(attempts)} rollouts has a reward ({first.lost}); the first one: {first.error}. "
            "Run `nat eval` on the same config to see it alone"
        )
    count, errors = len(attempts), [attempt.error for attempt in attempts if attempt.error is not None]
    if any(attempt.calls for attempt in attempts):
        if len(errors) == count and len({attempt.reward for attempt in attempts}) == 1 and not all_may_fail:
            raise RolloutsFailedError(
                f"all {count} rollouts failed with the same reward, as did all before them, so nothing can be learned; "
                f"the first one: {errors[0]}. Run `nat eval` on the same config to see it alone"
            )
        return
    if unattributed:
        raise RolloutsFailedError(
            f"none of the {unattributed} calls that {count} rollouts made of the policy says which rollout it belongs "
            "to (unattributed), so nothing can be trained. Another process made them, or a thread of its own: "
            f"{_OWN_CLIENT}"
        )
    if errors:
        raise RolloutsFailedError(
            f"{len(errors)} of {count} rollouts failed, and none called the policy; the first one: {errors[0]}. "
            "Run `nat eval` on the same config to see it alone"
        )
    raise RolloutsFailedError(
        f"none of {count} rollouts called the policy `{policy_name}`, so nothing can be trained. Set "
        f"`workflow.llm_name: {policy_name}`; for a client of your own, {_OWN_CLIENT}"
    )


def failure_notices(failures: Mapping[str, int], errors: Mapping[str, str], rollouts: int, scored: int) -> list[str]:
    """A sentence for each reason why rollouts of a batch failed, and one if the batch's reward leaves some out.

    Args:
        failures: how many failed, by reason.
        errors: the first error text of each reason.
        rollouts: how many there were in all.
        scored: how many of them have a reward.
    """
    notices = [
        f"{count} of {rollouts} rollouts failed ({reason}); the first one: {errors[reason]}"
        for reason, count in failures.items()
    ]
    if 0 < scored < rollouts:
        notices.append(f"the mean reward of these rollouts is that of {scored} of {rollouts}; the others have none")
    return notices
