"""A plain HTTP client of a server, that speaks the Tinker protocol's envelopes."""

from __future__ import annotations

from typing import Any

import httpx


class Wire:
    """A plain HTTP client of one server, that speaks the protocol's envelopes."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.http = httpx.Client(base_url=url, headers={"x-api-key": key} if key else {}, timeout=60)

    def post(self, endpoint: str, /, **body: Any) -> httpx.Response:
        """POST a JSON object below /api/v1."""
        return self.http.post(f"/api/v1/{endpoint}", json=body)

    def session(self) -> str:
        """A new session's id."""
        return str(self.post("create_session", tags=[], sdk_version="test").json()["session_id"])

    def model(self, session_id: str, base_model: str, seq: int = 0) -> str:
        """A new model's id, once it is there."""
        lora = {"rank": 2, "seed": 1}
        sent = self.post(
            "create_model", session_id=session_id, model_seq_id=seq, base_model=base_model, lora_config=lora
        )
        return str(self.result(sent)["model_id"])

    def result(self, sent: httpx.Response) -> dict[str, Any]:
        """The outcome of an operation."""
        assert sent.status_code == 200, sent.text
        while True:
            answer = self.post("retrieve_future", request_id=sent.json()["request_id"])
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                found: dict[str, Any] = answer.json()
                return found
