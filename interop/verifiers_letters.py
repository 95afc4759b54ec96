"""A verifiers taskset and its harness: two turns, each answered in the letters a to m for the whole reward."""

from __future__ import annotations

from collections.abc import Iterable

import httpx
import verifiers.v1 as vf

QUESTIONS = ("Hello?", "Who is there?", "What do you see?", "And then?")


def share(text: str) -> float:
    """Of its letters a to m."""
    return sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text))


class LettersTask(vf.Task[vf.TaskData]):
    """Its reward is the mean over the turns."""

    @vf.reward(weight=1.0)
    async def letters(self, trace: vf.Trace) -> float:
        replies = [str(message.content or "") for message in trace.assistant_messages]
        return sum(map(share, replies)) / max(1, len(replies))


class LettersTaskset(vf.Taskset[LettersTask, vf.TasksetConfig]):
    """Four questions."""

    def load(self) -> Iterable[LettersTask]:
        for question in QUESTIONS:
            yield LettersTask(vf.TaskData(prompt=question), self.config.task)


class LettersHarness(vf.Harness[vf.HarnessConfig]):
    """The agent: asks, and asks again. Its calls go through verifiers' server, as those of any program would."""

    NEEDS_CONTAINER = False
    EXECUTES_CODE = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):  # type: ignore[no-untyped-def]
        messages = [{"role": "user", "content": data.prompt}]
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {secret}"}, timeout=600) as client:
            for _ in range(2):
                body = {"model": ctx.model, "messages": messages}
                answer = (await client.post(f"{endpoint}/chat/completions", json=body)).raise_for_status().json()
                messages += [answer["choices"][0]["message"], {"role": "user", "content": "And more?"}]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["LettersHarness", "LettersTaskset"]
