"""A real browser, and pages in it that try to reach a server without keys on this machine."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_process import ServerProcess

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# A request that a page may send without asking first: no special header, and a type that forms have.
SEND = """
function send(tag) {
  const body = JSON.stringify({user_metadata: {from: tag}});
  return fetch("TARGET/api/v1/create_session", {method: "POST", mode: "no-cors", body: body});
}
"""
PAGE = """<!doctype html><title>waiting</title><script>SEND
const frame = (tag) => new Promise((done) => {
  window.addEventListener("message", (event) => event.data === tag && done());
  const element = document.createElement("iframe");
  element.sandbox = "allow-scripts";
  element.srcdoc = `<script>SEND
    send("${tag}").finally(() => parent.postMessage("${tag}", "*"))<` + "/script>";
  document.body.append(element);
});
addEventListener("load", async () => {
  await send("NAME page").catch(() => null);
  await Promise.race([frame("NAME sandbox"), new Promise((done) => setTimeout(done, 5000))]);
  document.title = "done";
});
</script><body></body>"""


@pytest.fixture
def pages(open_server: ServerProcess) -> Iterator[int]:
    """The port of a web server whose pages try it; the page's path is the name that it sends."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = PAGE.replace("SEND", SEND).replace("TARGET", open_server.url).replace("NAME", self.path[1:])
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def browse(url: str, profile: Path) -> str:
    """Open a page and give its document once it has done what it does."""
    command = [
        str(BROWSER),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *(f"--user-data-dir={profile}", "--host-resolver-rules=MAP evil.example 127.0.0.1"),
        *("--virtual-time-budget=20000", "--dump-dom", url),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False).stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here")
def test_pages_of_other_sites_and_sandboxed_frames_do_not_get_through(
    open_server: ServerProcess, pages: int, tmp_path: Path
) -> None:
    for host in ("evil.example", "127.0.0.1"):
        document = browse(f"http://{host}:{pages}/{host}", tmp_path / host)
        assert "<title>done</title>" in document, document
    sessions = httpx.get(f"{open_server.url}/api/v1/sessions", params={"limit": 1000}).json()["sessions"]
    metadata = [httpx.get(f"{open_server.url}/api/v1/sessions/{each}").json()["user_metadata"] for each in sessions]
    reached = {each["from"] for each in metadata if each and "from" in each}
    assert reached == {"127.0.0.1 page"}  # which anything on this machine may do, and shows that the pages do send
