import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.rollouts.art_groups import to_art_groups
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup

Make = Any
HAS_ART = importlib.util.find_spec("art") is not None


@pytest.fixture
def group(call: Make) -> TrajectoryGroup:
    opening = [{"role": "user", "content": "1+1?"}]
    tool_call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [tool_call]}
    first = call([1, 2], [3], messages=opening, reply=asked, tools=[{"type": "function", "function": {"name": "add"}}])
    seen = [*opening, asked, {"role": "tool", "content": "2", "tool_call_id": "c1"}]
    second = call([1, 2, 3, 4], [5, 6], messages=seen, stop_reason="length", policy_version=1)
    other = call([8], [9], messages=[{"role": "user", "content": "check"}])
    return TrajectoryGroup("group 0", [1.0, 0.0], [[first, second, other], [other]])


def test_art_groups_carry_the_exact_tokens(group: TrajectoryGroup) -> None:
    if not HAS_ART:
        pytest.skip("needs openpipe-art (extra `art`)")
    (converted,) = to_art_groups([group])
    import art

    assert isinstance(converted, art.TrajectoryGroup)
    assert [trajectory.reward for trajectory in converted] == [1.0, 0.0]
    trajectory = converted.trajectories[0]
    assert [message["role"] for message in trajectory.messages()] == ["user", "assistant", "tool", "assistant"]
    asked, final = trajectory.messages_and_choices[1], trajectory.messages_and_choices[3]
    assert [entry.token for entry in final.logprobs.content] == ["token_id:5", "token_id:6"]
    assert [entry.logprob for entry in final.logprobs.content] == [-0.25, -0.5]
    assert (asked.finish_reason, final.finish_reason) == ("tool_calls", "length")
    assert asked.message.tool_calls[0].function.name == "add"
    assert (trajectory.initial_policy_version, trajectory.final_policy_version) == (0, 1)
    assert trajectory.tools[0]["function"]["name"] == "add"
    (history,) = trajectory.additional_histories
    assert next(message["content"] for message in history.messages()) == "check"


def test_without_art_the_error_says_what_to_type(group: TrajectoryGroup) -> None:
    if HAS_ART:
        pytest.skip("openpipe-art is installed here")
    with pytest.raises(ConfigError, match=r"pip install 'nat_plugin_evsys\[art\]'"):
        to_art_groups([group])


def test_art_is_not_imported_before_it_is_asked_for() -> None:
    code = "import sys, nat_plugin_evsys.rollouts.art_groups; sys.exit('art' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
