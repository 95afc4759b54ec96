"""No error ends a run as `Error: ` and nothing more."""

from __future__ import annotations

import pytest
import torch

from nat_plugin_evsys.errors import ConfigError, EvsysError, OutOfMemoryError
from nat_plugin_evsys.finetuning.readable import readable_failures
from nat_plugin_evsys.training.job import describe_error


def test_memory_that_ran_out_is_named_with_what_needs_less() -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"memory ran out \(MemoryError: .*lower max_batch_size"),
        readable_failures(),
    ):
        raise MemoryError
    with pytest.raises(OutOfMemoryError, match="allocate"), readable_failures():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert describe_error(MemoryError()) == "MemoryError: memory ran out"


def test_an_error_without_a_text_gets_its_name_and_others_pass() -> None:
    with pytest.raises(EvsysError, match="AssertionError, without a text"), readable_failures():
        raise AssertionError
    for error in (ConfigError("mine"), OSError("disk")):
        with pytest.raises(type(error)) as caught, readable_failures():
            raise error
        assert caught.value is error
