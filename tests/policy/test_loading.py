"""A policy whose model cannot be used leaves nothing behind, and is tried again at the next call."""

from __future__ import annotations

from pathlib import Path

import pytest

from nat_plugin_evsys.config import EvsysPolicyConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.runtime.bases import BASES_IN_USE


async def test_a_load_that_fails_after_the_model_is_loaded_keeps_one_model(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    config = EvsysPolicyConfig(
        base_model="builtin/tiny", checkpoint="none", output_dir=tmp_path, chat_template=template, lora_rank=2
    )
    policy = Policy(config)
    backends = set()
    for _ in range(3):
        with pytest.raises(ConfigError, match="chat_template"):
            await policy.ensure_loaded()
        backends.add(policy.backend)
    template.write_text("{{ messages[0].content }}")
    await policy.ensure_loaded()
    assert backends == {policy.backend}
    used = policy.backend._shared
    assert BASES_IN_USE._users[id(used)] == 1
    await policy.close()
    assert id(used) not in BASES_IN_USE._users
