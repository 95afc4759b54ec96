"""ART's backend, as far as it goes without ART; `make test-interop` trains with it."""

from __future__ import annotations

from typing import Any

import pytest

from nat_plugin_evsys.art import LocalBackend
from nat_plugin_evsys.errors import UnsupportedError


@pytest.mark.parametrize("plan", [{"lr_schedule": "linear"}, {"lr_warmup": 8}, {"lr_scaling": "unsolved"}], ids=str)
def test_train_takes_the_rate_of_each_step(plan: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"{min(plan)} has no effect here: give train"):
        LocalBackend(trainer=plan)
