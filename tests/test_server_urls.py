"""The URLs of servers in settings: scheme, host, port and path, whichever setting it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from nat_plugin_evsys.config.policy import EvsysPolicyConfig
from nat_plugin_evsys.config.serve import ServeConfig
from nat_plugin_evsys.config.vllm import VllmConfig

SETTINGS: dict[str, Callable[[str], str | None]] = {
    "base_url": lambda url: EvsysPolicyConfig(base_model="m", base_url=url).base_url,
    "vllm.base_url": lambda url: VllmConfig(base_url=url).base_url,
    "public_url": lambda url: ServeConfig(base_models=["m"], public_url=url).public_url,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("url", ["h", "h:1", "ftp://h", "http://", "http://[::1", "http://h:x", "http://h:0", ""])
def test_what_leads_to_no_server_is_shown_and_refused(setting: str, url: str) -> None:
    with pytest.raises(ValidationError, match=f"{setting} is '.*'; it must be a URL such as http"):
        SETTINGS[setting](url)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("end", ["me:secret@h", ":secret@h", "me@h", "h?key=secret", "h/#secret"])
def test_a_url_that_may_hold_a_key_is_refused(setting: str, end: str) -> None:
    with pytest.raises(ValidationError, match=f"{setting} must be scheme, host, port and path alone; put a key into"):
        SETTINGS[setting](f"http://{end}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_slashes_at_the_end_go(setting: str) -> None:
    assert SETTINGS[setting]("https://h:1/a/") == "https://h:1/a"
    assert SETTINGS[setting]("http://[::1]:8000//") == "http://[::1]:8000"
