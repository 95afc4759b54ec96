"""Log-probabilities of tokens, as OpenAI writes those of a reply and vLLM those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.protocol import ChoiceLogprobs, PromptLogprobs, TokenLogprob, TopLogprob

Candidates = Sequence[list[tuple[int, float]] | None]
"""Of each position the likeliest tokens and their logprobs, in falling order."""

_IMPOSSIBLE = -9999.0  # OpenAI's; JSON has no -Infinity


class TokenNames:
    """Writes tokens by their text, or with ``by_id`` as ``token_id:ID``."""

    def __init__(self, renderer: ChatRenderer, *, by_id: bool) -> None:
        self._renderer = renderer
        self._by_id = by_id

    def of_choice(self, ids: Sequence[int], logprobs: Sequence[float], top: Candidates | None = None) -> ChoiceLogprobs:
        """OpenAI's ``logprobs`` of sampled tokens."""
        tops = top if top is not None else [None] * len(ids)
        return ChoiceLogprobs(
            content=[
                TokenLogprob(
                    **self._entry(token_id, logprob),
                    top_logprobs=[TopLogprob(**self._entry(*candidate)) for candidate in candidates or ()],
                )
                for token_id, logprob, candidates in zip(ids, logprobs, tops, strict=True)
            ]
        )

    def of_prompt(
        self, ids: Sequence[int], logprobs: Sequence[float | None], top: Candidates | None = None
    ) -> PromptLogprobs:
        """vLLM's ``prompt_logprobs``: of each token, and of the likeliest in its place; the first has none.

        ``rank`` is null for a token that is not among the likeliest.
        """
        tops = top if top is not None else [None] * len(ids)
        found: PromptLogprobs = []
        for token_id, logprob, candidates in zip(ids, logprobs, tops, strict=True):
            if logprob is None:
                found.append(None)
                continue
            ranks = {candidate: rank for rank, (candidate, _) in enumerate(candidates or (), 1)}
            values = {token_id: logprob} | dict(candidates or ())
            found.append(
                {
                    str(each): {
                        "logprob": max(value, _IMPOSSIBLE),
                        "rank": ranks.get(each),
                        "decoded_token": self._name(each, self._renderer.token_bytes(each)),
                    }
                    for each, value in values.items()
                }
            )
        return found

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._renderer.token_bytes(token_id)
        return {"token": self._name(token_id, data), "logprob": max(logprob, _IMPOSSIBLE), "bytes": list(data)}

    def _name(self, token_id: int, data: bytes) -> str:
        return f"token_id:{token_id}" if self._by_id else data.decode("utf-8", "replace")
