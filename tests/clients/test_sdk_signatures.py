"""Every public method of the SDK's four clients is here, with the parameters of the SDK in the SDK's order."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import tinker

import nat_plugin_evsys
from nat_plugin_evsys.errors import UnsupportedError

PAIRS = ["ServiceClient", "TrainingClient", "SamplingClient", "RestClient"]
METHODS = [
    (client, name)
    for client in PAIRS
    for name, member in inspect.getmembers(getattr(tinker, client))
    if not name.startswith("_") and callable(member)
]


def parameters(function: Any) -> list[inspect.Parameter]:
    found = inspect.signature(inspect.unwrap(function)).parameters.values()
    return [p for p in found if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


@pytest.mark.parametrize(("client", "name"), METHODS)
def test_method_and_parameters(client: str, name: str) -> None:
    theirs = getattr(getattr(tinker, client), name)
    ours = getattr(getattr(nat_plugin_evsys, client), name)
    if "Not offered" in (ours.__doc__ or ""):
        with pytest.raises(UnsupportedError, match=f"{client}.{name.removesuffix('_async')}"):
            ours(None)
        return
    expected, found = parameters(theirs), parameters(ours)
    assert [p.name for p in found[: len(expected)]] == [p.name for p in expected]
    for their, our in zip(expected, found, strict=False):
        if their.default is not their.empty:
            assert our.default == their.default
    assert all(p.default is not p.empty for p in found[len(expected) :])
    assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(inspect.unwrap(theirs))


def test_the_constructor_takes_the_sdks_parameters() -> None:
    expected = [p.name for p in parameters(tinker.ServiceClient)]
    assert [p.name for p in parameters(nat_plugin_evsys.ServiceClient)][: len(expected)] == expected


def test_importing_the_package_imports_neither_torch_nor_tinker() -> None:
    code = (
        "import sys, nat_plugin_evsys; from nat_plugin_evsys import types;"
        "print([m for m in ('torch', 'tinker', 'transformers') if m in sys.modules]);"
        "from nat_plugin_evsys import ServiceClient; print(ServiceClient.__name__, types.Datum.__name__)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["[]", "ServiceClient Datum"]
