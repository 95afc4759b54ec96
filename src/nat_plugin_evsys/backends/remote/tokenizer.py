"""The tokenizer of a model that a Tinker service has."""

from __future__ import annotations

import asyncio
from typing import Any

from nat_plugin_evsys.backends.remote.session import TinkerSession
from nat_plugin_evsys.backends.remote.waiting import in_thread
from nat_plugin_evsys.errors import ConfigError, EvsysError


async def find_tokenizer(session: TinkerSession, name: str | None) -> Any:
    """The Hugging Face tokenizer ``name``; without one that of ``base_model`` on this machine, else the SDK's finding.

    Raises:
        ConfigError: the SDK finds none; the message names the setting.
        ModelError: ``name`` or ``base_model`` has none that loads.
    """
    from nat_plugin_evsys.engine.model.loading import load_tokenizer
    from nat_plugin_evsys.engine.model.source import is_local

    source = name or (session.base_model if is_local(session.base_model) else None)
    if source is not None:
        return await asyncio.to_thread(load_tokenizer, source)
    client = session.training_client or await session.open_sampler(None)
    finding = in_thread(client.get_tokenizer, "evsys-tokenizer")
    try:
        return await session.watch.wait(finding, "finding the tokenizer", "start")
    except EvsysError:
        raise
    except Exception as error:
        # Boundary: transformers and the hub client raise many types.
        raise ConfigError(
            f"no tokenizer for `{session.base_model}` on this machine ({type(error).__name__}: {error}); set "
            "`tokenizer:` to a local directory or a Hugging Face id that has it"
        ) from error
