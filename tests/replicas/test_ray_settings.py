"""What ``ray:`` takes, and what it refuses by name."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from pydantic import ValidationError

from nat_plugin_evsys.config.policy import EvsysPolicyConfig
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.config.serve import ServeConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.replicas import cluster


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"replica": 2}, "did you mean `replicas`"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RayConfig.model_validate(settings)


def test_a_service_has_its_own_replicas() -> None:
    with pytest.raises(ValidationError, match="nat evsys serve --ray"):
        EvsysPolicyConfig.model_validate({"base_model": "m", "base_url": "http://h:1", "ray": {"replicas": 2}})


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_the_extra_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'nat_plugin_evsys\[ray\]'"):
        cluster.join(None)


def test_what_is_split_over_gpus_needs_something_else_to_sample() -> None:
    ray = {"replicas": 1, "gpus_per_replica": 2}
    with pytest.raises(ValidationError, match="set rollout_engine: vllm, or gpus_per_replica: 1"):
        EvsysPolicyConfig.model_validate({"base_model": "m", "ray": ray})
    assert EvsysPolicyConfig.model_validate({"base_model": "m", "ray": ray, "rollout_engine": "vllm"}).ray is not None
    with pytest.raises(ValidationError, match="a server does both"):
        ServeConfig.model_validate({"base_models": ["m"], "ray": ray})
