"""An agent that Agent Lightning runs, in a process for each rollout: two questions, rewarded for the letters a to m."""

from __future__ import annotations

import os

import httpx


class LettersAgent:
    """Its model is where Agent Lightning says; its reward goes where Agent Lightning says."""

    def run(self) -> None:
        messages = [{"role": "user", "content": os.environ["QUESTION"]}]
        said = ""
        with httpx.Client(headers={"authorization": f"Bearer {os.environ['AGL_KEY']}"}, timeout=300) as client:
            for _ in range(2):
                body = {"model": "policy", "messages": messages, "max_tokens": 16}
                answer = client.post(f"{os.environ['AGL_OPENAI_BASE_URL']}/chat/completions", json=body)
                reply = answer.raise_for_status().json()["choices"][0]["message"]
                said += reply["content"] or ""
                messages += [reply, {"role": "user", "content": "And more?"}]
            reward = sum(letter in "abcdefghijklm" for letter in said) / max(1, len(said))
            event = {"event_type": "reward", "data": {"value": reward}}
            client.post(os.environ["AGL_EVENT_URL"], json=event).raise_for_status()
