"""An OpenAI endpoint whose replies are given, to see what an agent sends."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Listener(ThreadingHTTPServer):
    """An OpenAI endpoint that notes each request and answers with the next of ``replies``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.replies: list[dict[str, Any]] = []

    def llm(self) -> dict[str, Any]:
        """The LLM section of a workflow that talks to it."""
        url = f"http://127.0.0.1:{self.server_port}/v1"
        return {
            "_type": "openai",
            "api_key": "none",
            "base_url": url,
            "model_name": "policy",
            "disable_streaming": True,
        }


class Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        reply = self.server.replies[len(self.server.requests)]
        self.server.requests.append(request)
        choice = {"index": 0, "message": reply, "finish_reason": "tool_calls" if "tool_calls" in reply else "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": request["model"]}
        data = json.dumps({**body, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass
