"""A record's calls with tokens: its own where it has them, else those of its text if that is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field

from nat_plugin_evsys.calls import Call, DropReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.plain_episodes import Reading, Renderer, reply_tokens
from nat_plugin_evsys.rollouts.retokenized import Drift
from nat_plugin_evsys.rollouts.traces.record import Record, TracedCall


@dataclass(slots=True)
class CallReader:
    """Turns records into calls.

    Attributes:
        retokenize: see the adapter's setting.
        temperature: that the calls were sampled at.
        model_names: by which records name the policy's model; only that one's counts of tokens can be compared.
        needs_logprobs: refuse replies whose logprobs are not recorded.
        drift: of replies whose own tokens, or their number, are recorded.
        prompt_drift: of prompts whose number of tokens is recorded.
    """

    renderer: Renderer
    retokenize: bool
    temperature: float
    model_names: frozenset[str]
    needs_logprobs: bool = False
    drift: Drift = field(default_factory=Drift)
    prompt_drift: Drift = field(default_factory=Drift)

    def calls(self, record: Record, run_id: str) -> tuple[list[Call], DropReason | None, str | None]:
        """The calls, why they cannot be trained on, and what was seen; the calls are empty where there is a reason."""
        if record.problem is not None:
            return [], record.problem, record.error
        if not record.calls:
            return [], DropReason.NO_CALLS, None
        if not self.retokenize and not all(self._token_ids(call) or call.logprobs for call in record.calls):
            return [], DropReason.TEXT_ONLY, None
        try:
            prompts = [self.renderer.render(call.messages, call.tools or None) for call in record.calls]
            if any(map(self._lacks_system_prompt, record.calls, prompts)):
                return [], DropReason.PROMPT_UNKNOWN, None
            calls = zip(record.calls, prompts, strict=True)
            return [self._call(call, prompt, run_id, at) for at, (call, prompt) in enumerate(calls)], None, None
        except DataError as error:
            return [], DropReason.NOT_RENDERED, str(error)

    def _lacks_system_prompt(self, call: TracedCall, prompt_ids: list[int]) -> bool:
        known = call.prompt_tokens is not None and call.model in self.model_names
        return call.without_system and known and call.prompt_tokens != len(prompt_ids)

    def _call(self, call: TracedCall, prompt_ids: list[int], run_id: str, at: int) -> Call:
        reading = Reading(f"call {at}", self.renderer, self.retokenize, self.drift)
        tokens = reply_tokens(call.logprobs, call.reply, reading, self._token_ids(call))
        if self.needs_logprobs and tokens.logprobs_unknown:
            raise DataError(
                f"call {at}: {len(tokens.ids)} tokens and {len(call.logprobs)} logprobs, by which algorithm `rl` "
                "weighs replies; record the logprobs too, or choose algorithm: sft or dpo"
            )
        if call.model in self.model_names:
            if call.prompt_tokens is not None:
                self.prompt_drift.compare_length(call.prompt_tokens, len(prompt_ids), exactly=True)
            if call.reply_tokens is not None and tokens.retokenized:
                self.drift.compare_length(call.reply_tokens, len(tokens.ids))
        return Call(
            call_id=f"{run_id}-{at}",
            index=0,
            run_id=run_id,
            step_id=None,
            policy_version=0,
            prompt_ids=prompt_ids,
            output_ids=tokens.ids,
            logprobs=tokens.logprobs,
            stop_reason=tokens.stop_reason,
            temperature=self.temperature,
            top_p=1.0,
            messages=call.messages,
            tools=call.tools,
            reply=call.reply,
            sequence=at,
            functions=list(call.functions),
            retokenized=tokens.retokenized,
            logprobs_unknown=tokens.logprobs_unknown,
        )

    def _token_ids(self, call: TracedCall) -> list[int]:
        """The recorded tokens of the reply; without logprobs, only where no other model is named, whose ids may mean
        other tokens."""
        ids = call.token_ids or []
        foreign = call.model != "" and call.model not in self.model_names
        return [] if foreign and len(call.logprobs) != len(ids) else ids
