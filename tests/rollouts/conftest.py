import itertools
from collections.abc import Callable
from typing import Any

import pytest

from nat_plugin_evsys.calls import Call

_numbers = itertools.count()


def make_call(prompt_ids: list[int], output_ids: list[int], **fields: Any) -> Call:
    number = next(_numbers)
    defaults: dict[str, Any] = {
        "call_id": f"chatcmpl-{number}",
        "index": 0,
        "run_id": "run",
        "step_id": None,
        "policy_version": 0,
        "logprobs": [-0.25 * (i + 1) for i in range(len(output_ids))],
        "stop_reason": "stop",
        "temperature": 1.0,
        "top_p": 1.0,
        "messages": [{"role": "user", "content": "question"}],
        "tools": [],
        "reply": {"role": "assistant", "content": f"reply {number}"},
        "sequence": number,
    }
    return Call(prompt_ids=prompt_ids, output_ids=output_ids, **(defaults | fields))


@pytest.fixture(scope="session")
def call() -> Callable[..., Call]:
    return make_call
