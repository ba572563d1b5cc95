"""Skills of repositories, fetched from a server of the tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from run_kit import House, agent

from voidbus.actors.messages.runs import RunStatus
from voidbus.actors.workloads.remote_skill import PLACE_VARIABLE, remote_skill_url
from voidbus.sidecar import fetch
from voidbus.sidecar.fetch import NotFetched, fetch_text

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def place(answer: Answer) -> Iterator[str]:
    """A server that answers every GET so; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                answer(self)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()


def sending(content: bytes, status: int = 200) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def test_a_skill_is_what_its_address_has() -> None:
    with place(sending(b"# Lint")) as url:
        assert fetch_text(f"{url}/o/r/main/SKILL.md", 100) == b"# Lint"


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"", 404, "was answered with 404 Not Found"),
        (b"x" * 101, 200, "has over 100 bytes"),
        (b"\xff\xfe", 200, "is no text in UTF-8"),
    ],
)
def test_what_is_no_skill_is_not_fetched(content: bytes, status: int, says: str) -> None:
    with place(sending(content, status)) as url, pytest.raises(NotFetched, match=says):
        fetch_text(url, 100)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-"])
def test_a_place_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.3)
    ended = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        while not ended.wait(0.05):
            handler.wfile.write(b"x")

    with place(drip) as url, pytest.raises(NotFetched, match=r"did not come within 0\.3 s"):
        fetch_text(url, 100_000)
    ended.set()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/etc/passwd"])
def test_only_http_is_fetched(url: str) -> None:
    with pytest.raises(NotFetched, match="is no http: or https: address"):
        fetch_text(url, 100)


def test_another_place_may_be_named() -> None:
    assert remote_skill_url("o/r/lint", {PLACE_VARIABLE: "https://mirror.test/raw/"}) == (
        "lint",
        "https://mirror.test/raw/o/r/main/skills/lint/SKILL.md",
    )


@pytest.mark.parametrize("skill", ["there", "gone"])
def test_a_run_fetches_its_skill_or_fails_by_its_name(house: House, skill: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        there = handler.path == "/o/there/main/SKILL.md"
        sending(b"# There" if there else b"", 200 if there else 404)(handler)

    with place(answer) as url:
        spec = agent(messaging=False)
        spec["agent"]["skills"] = [f"remote:o/{skill}"]
        house.start(spec, host_env={PLACE_VARIABLE: url})
        state = house.wait_over()
    if skill == "there":
        assert state.status is RunStatus.SUCCEEDED
        assert any("Skills: there" in line for line in house.log())
    else:
        assert state.status is RunStatus.FAILED
        assert "skill remote:o/gone: " in (state.error or "")
        assert "404" in (state.error or "")
