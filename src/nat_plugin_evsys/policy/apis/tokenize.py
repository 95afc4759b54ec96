"""vLLM's ``POST …/tokenize``: the ids of a text, or of a conversation as the policy would read it."""

from __future__ import annotations

import asyncio
from typing import Any

from nat_plugin_evsys.policy.api_errors import bad_request
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.completions import PolicySource, resolved
from nat_plugin_evsys.policy.history import History
from nat_plugin_evsys.policy.prompts import prompt_of
from nat_plugin_evsys.policy.protocol import dumps
from nat_plugin_evsys.policy.request import ChatCompletionRequest


class TokenizeRequest:
    """One request: ``prompt``, or ``messages`` with or without ``tools``; ``return_token_strs`` adds the tokens' text.

    Raises:
        ApiError: 400 that names the field.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        rest = dict(body)
        prompt, self._texts = rest.pop("prompt", None), bool(rest.pop("return_token_strs", False))
        if (prompt is None) == (rest.get("messages") is None):
            raise bad_request("send either `prompt` or `messages`", code="invalid_value")
        if prompt is not None and not isinstance(prompt, str):
            raise bad_request("`prompt`: must be text", param="prompt", code="invalid_value")
        self._prompt: str | None = prompt
        if prompt is not None:
            rest.pop("add_special_tokens", None)  # no template, no special tokens: as for completions
            rest["messages"] = [{"role": "user", "content": prompt}]
        self._chat = ChatCompletionRequest.parse(rest)
        self.model = self._chat.model

    async def answer(self, source: PolicySource, run_id: str | None) -> bytes:
        """vLLM's answer, as JSON. Loads the model if necessary.

        Args:
            run_id: the rollout that the conversation belongs to.

        Raises:
            EvsysError: the messages cannot be rendered, or the policy cannot be loaded.
        """
        renderer = await resolved(source.renderer)
        if self._prompt is not None:
            ids = await asyncio.to_thread(renderer.encode, self._prompt)
        else:
            ids = (await prompt_of(self._chat, renderer, source.history or History(), source.scope_of(run_id))).ids
        return await asyncio.to_thread(self._written, renderer, ids)

    def _written(self, renderer: ChatRenderer, ids: list[int]) -> bytes:
        texts = {"token_strs": [renderer.decode([token_id]) for token_id in ids]} if self._texts else {}
        return dumps({"count": len(ids), "tokens": ids, **texts})
