"""News of the inbox as they come: long poll, server-sent events, and `void-message --follow`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidecar_kit import RunningSidecar, answering, entry, inbox, running_sidecar

from voidbus.sidecar.client import Abort, Cancelled, SidecarClient, SidecarClientError, _Answer
from voidbus.sidecar.inbox import Inbox
from voidbus.sidecar.signals import MAX_POLL, MAX_WAITING, Bounds


@pytest.fixture
def sidecar() -> Iterator[RunningSidecar]:
    with running_sidecar() as running:
        yield running


@contextmanager
def asking(sidecar: RunningSidecar, *lines: str) -> Iterator[socket.socket]:
    """A connection on which a request for signals was sent."""
    with sidecar.connect() as connection:
        connection.sendall("\r\n".join([*lines, "Host: s", "", ""]).encode())
        yield connection


def wait_for_followers(sidecar: RunningSidecar, count: int) -> None:
    """Until so many follow. Health answers are the beat; a test's time limit is the deadline."""
    while sidecar.server.followers() != count:
        sidecar.call("GET", "/v1/health")


def poll(sidecar: RunningSidecar, query: str) -> dict[str, Any]:
    status, view = sidecar.call("GET", f"/v1/signals{query}")
    assert status == 200, view
    return dict(view)


def ids(view: dict[str, Any]) -> list[str]:
    return [one["message_id"] for one in view["entries"]]


class Stream:
    """Reads server-sent events out of a chunked answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")
        self.head = b""
        while (line := self._file.readline()) not in (b"\r\n", b""):
            self.head += line
        self._text = b""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def next(self) -> dict[str, str]:
        """The next event or comment; empty at the end."""
        while b"\n\n" not in self._text:
            size = int(self._file.readline() or b"0", 16)
            if size == 0:
                return {}
            self._text += self._file.read(size)
            self._file.readline()
        block, _, self._text = self._text.partition(b"\n\n")
        fields = [line.partition(":")[::2] for line in block.decode().split("\n")]
        return {name: value.removeprefix(" ") for name, value in fields}


# What a follower is told


def test_a_follower_without_a_version_is_told_everything_at_once(sidecar: RunningSidecar) -> None:
    assert poll(sidecar, "")["version"] == 0
    sidecar.server.load_inbox(inbox("a", version=3))
    assert ids(poll(sidecar, "")) == ["a"]
    assert ids(poll(sidecar, "?since=2&timeout=60")) == ["a"]


def test_a_follower_who_is_up_to_date_waits_for_what_is_new(sidecar: RunningSidecar) -> None:
    sidecar.server.load_inbox(inbox("a", version=3))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(poll, sidecar, "?since=3&timeout=60")
        wait_for_followers(sidecar, 1)
        assert not waiting.done()
        sidecar.server.push_message(entry("m"))
        view = waiting.result(10)
    assert (view["version"], ids(view)) == (4, ["m"])


def test_a_poll_ends_at_its_timeout_with_no_entries(sidecar: RunningSidecar) -> None:
    sidecar.server.load_inbox(inbox("a", version=3))
    view = poll(sidecar, "?since=3&timeout=0")
    assert (view["version"], view["entries"]) == (3, [])
    assert poll(sidecar, "?since=3&timeout=0.01")["entries"] == []


@pytest.mark.parametrize("timeout", ["x", "-1", "1e9", "", "nan", "1.2.3", "9" * 5000, "%D9%A1"])
def test_a_timeout_that_is_no_number_is_refused(sidecar: RunningSidecar, timeout: str) -> None:
    status, error = sidecar.call("GET", f"/v1/signals?since=0&timeout={timeout}")
    assert (status, error["code"], error["field"]) == (400, "INVALID_PARAMS", "timeout")


def test_a_poll_waits_no_longer_than_the_bound() -> None:
    with running_sidecar(bounds=Bounds(poll=0.01)) as sidecar:
        assert poll(sidecar, f"?since=0&timeout={MAX_POLL * 10:g}")["entries"] == []


def test_a_follower_ahead_of_the_inbox_begins_anew(sidecar: RunningSidecar) -> None:
    with ThreadPoolExecutor(1) as pool:
        sidecar.server.load_inbox(inbox("a", version=9))
        waiting = pool.submit(poll, sidecar, "?since=9&timeout=60")
        wait_for_followers(sidecar, 1)
        sidecar.server.load_inbox(inbox("a", "b", version=2))
        view = waiting.result(10)
    assert (view["version"], ids(view)) == (2, ["a", "b"])


_steps = st.lists(
    st.tuples(st.just("push"), st.none())
    | st.tuples(st.just("load"), st.none() | st.integers(0, 9)),
    max_size=12,
)


@given(_steps, st.sets(st.integers(0, 12)))
def test_whenever_a_follower_looks_it_misses_nothing_and_is_told_nothing_twice(
    steps: list[tuple[str, int | None]], looks: set[int]
) -> None:
    """Where the orchestrator's numbers go up; where they go back, it begins anew."""
    box = Inbox("e", "c")
    seen: int | None = None
    told: list[str] = []
    expected: list[str] = []
    for number, (step, version) in enumerate(steps):
        name = f"m{number}"
        if step == "push":
            box.push(entry(name))
        else:
            if version is not None and version <= box.given_version:
                version = None
            box.load(inbox(*expected, name, version=version))
        expected.append(name)
        if number in looks:
            view = box.news(seen)
            assert view is not None
            told += [one.message_id for one in view.entries]
            seen = view.version
            assert told == expected
            assert box.news(seen) is None


# The stream


def test_a_stream_gives_each_change_an_event_whose_id_is_the_version(
    sidecar: RunningSidecar,
) -> None:
    sidecar.server.load_inbox(inbox("a", version=3))
    lines = ("GET /v1/signals?since=0 HTTP/1.1", "Accept: text/event-stream")
    with asking(sidecar, *lines) as connection, Stream(connection) as stream:
        assert b"text/event-stream" in stream.head
        first = stream.next()
        assert (first["event"], first["id"], ids(json.loads(first["data"]))) == (
            "inbox",
            "3",
            ["a"],
        )
        sidecar.server.push_message(entry("m", "two\nlines\u2028"))
        second = stream.next()
        assert second["id"] == "4"
        assert json.loads(second["data"])["entries"][0]["payload"] == "two\nlines\u2028"


def test_a_stream_goes_on_after_the_event_its_client_saw_last(sidecar: RunningSidecar) -> None:
    sidecar.server.load_inbox(inbox("a", version=3))
    sidecar.server.push_message(entry("m"))
    lines = ("GET /v1/signals?since=0 HTTP/1.1", "accept: */*, Text/Event-Stream;q=1")
    with (
        asking(sidecar, *lines, "Last-Event-ID: 3") as connection,
        Stream(connection) as stream,
    ):
        event = stream.next()
        assert (event["id"], ids(json.loads(event["data"]))) == ("4", ["m"])


def test_a_stream_beats_while_nothing_happens_and_ends_at_its_age() -> None:
    with running_sidecar(bounds=Bounds(stream=0.2, heartbeat=0.01)) as sidecar:
        lines = ("GET /v1/signals?since=0 HTTP/1.1", "Accept: text/event-stream")
        with asking(sidecar, *lines) as connection, Stream(connection) as stream:
            assert stream.next() == {"": ""}
            while (event := stream.next()) == {"": ""}:
                pass
            assert event["event"] == "end"
            assert "connect again" in json.loads(event["data"])["reason"]
            assert stream.next() == {}
        wait_for_followers(sidecar, 0)


def test_a_client_that_does_not_read_is_told_so_and_dropped(tmp_path: Path) -> None:
    # A Unix socket, whose buffers are small: most of the inbox waits in the sidecar.
    with running_sidecar(tmp_path / "s", bounds=Bounds(slow=0.05)) as sidecar:
        sidecar.server.load_inbox(inbox("a", version=1, payload="x" * 4_000_000))
        lines = ("GET /v1/signals HTTP/1.1", "Accept: text/event-stream")
        with asking(sidecar, *lines) as connection:
            connection.recv(1, socket.MSG_PEEK)  # it has begun
            wait_for_followers(sidecar, 0)
            with Stream(connection) as stream:
                assert stream.next()["id"] == "1"
                end = stream.next()
                assert end["event"] == "end"
                assert "did not read" in json.loads(end["data"])["reason"]
                assert stream.next() == {}


# Bounds and ends


def test_one_follower_too_many_is_told_so_and_others_are_still_served(
    sidecar: RunningSidecar,
) -> None:
    with ThreadPoolExecutor(MAX_WAITING) as pool:
        waiting = [pool.submit(poll, sidecar, "?since=0&timeout=60") for _ in range(MAX_WAITING)]
        wait_for_followers(sidecar, MAX_WAITING)
        for accept in ("*/*", "text/event-stream"):
            status, error = sidecar.call("GET", "/v1/signals?since=0", Accept=accept)
            assert (status, error["code"], error["retryable"]) == (429, "TOO_MANY_REQUESTS", True)
        assert sidecar.call("GET", "/v1/inbox")[0] == 200
        sidecar.server.push_message(entry("m"))
        assert all(ids(one.result(10)) == ["m"] for one in waiting)
    wait_for_followers(sidecar, 0)


def test_a_follower_that_has_gone_is_not_counted(sidecar: RunningSidecar) -> None:
    with asking(sidecar, "GET /v1/signals?since=0&timeout=60 HTTP/1.1"):
        wait_for_followers(sidecar, 1)
    wait_for_followers(sidecar, 0)


def test_the_stop_of_the_sidecar_ends_polls_and_streams(sidecar: RunningSidecar) -> None:
    streaming = ("GET /v1/signals?since=0 HTTP/1.1", "Accept: text/event-stream")
    with (
        ThreadPoolExecutor(1) as pool,
        asking(sidecar, *streaming) as connection,
        Stream(connection) as stream,
    ):
        waiting = pool.submit(poll, sidecar, "?since=0&timeout=60")
        wait_for_followers(sidecar, 2)
        sidecar.server.stop(10)
        assert waiting.result(10)["entries"] == []
        end = stream.next()
        assert (end["event"], json.loads(end["data"])) == (
            "end",
            {"reason": "the sidecar is stopping"},
        )
        assert stream.next() == {}


# The client


def test_a_request_that_waits_can_be_ended_from_another_thread(sidecar: RunningSidecar) -> None:
    abort = Abort()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(SidecarClient(sidecar.url).signals, 0, abort)
        wait_for_followers(sidecar, 1)
        abort.cancel()
        with pytest.raises(Cancelled):
            waiting.result(10)
    with pytest.raises(Cancelled):
        SidecarClient(sidecar.url).signals(0, abort)


def test_the_client_reads_chunks_and_passes_over_100_continue() -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with answering(answer + b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") as url:
        assert SidecarClient(url).request("GET", "/").body == b"abcde"


# void-message inbox --follow


@contextmanager
def following(url: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "voidbus.sidecar.void_message", "inbox", "--follow", *options]
    environment = {"PATH": os.environ["PATH"], "VOID_SIDECAR_URL": url}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        # The test's own end, if it fails while the process still waits.
        guard = threading.Timer(40, process.kill)
        guard.start()
        try:
            yield process
        finally:
            process.kill()
            guard.cancel()


def test_follow_prints_each_entry_on_a_line_and_ctrl_c_ends_it_cleanly(
    sidecar: RunningSidecar,
) -> None:
    sidecar.server.load_inbox(inbox("old", "a", version=3))
    with following(sidecar.url) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["message_id"] == "old"
        assert json.loads(process.stdout.readline())["message_id"] == "a"
        wait_for_followers(sidecar, 1)
        sidecar.server.push_message(entry("m", "grüße\nzwei"))
        line = process.stdout.readline()
        assert json.loads(line)["payload"] == "grüße\nzwei"
        assert "grüße".encode() in line
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == b""
        assert process.stdout.read() == b""


def test_follow_begins_after_the_version_it_is_given(sidecar: RunningSidecar) -> None:
    sidecar.server.load_inbox(inbox("old", version=3))
    sidecar.server.push_message(entry("new"))
    with following(sidecar.url, "--since", "3") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["message_id"] == "new"


def test_follow_survives_a_sidecar_that_comes_back_and_gives_up_on_one_that_does_not() -> None:
    with running_sidecar() as first:
        first.server.load_inbox(inbox("a", version=3))
        address = first.address
        state = first.server.snapshot()
        with following(first.url) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert json.loads(process.stdout.readline())["message_id"] == "a"
            first.server.stop(10)
            with running_sidecar(address, snapshot=state) as second:
                second.server.push_message(entry("m"))
                assert json.loads(process.stdout.readline())["message_id"] == "m"
            assert process.wait(20) == 1
            assert process.stderr.read().startswith(b"error: can't connect to the sidecar")


def test_follow_gives_up_at_once_on_a_sidecar_it_never_reached() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with following(f"http://127.0.0.1:{unused.getsockname()[1]}") as process:
            assert process.wait(20) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 501 No\r\nContent-Length: 2\r\n\r\n{}", b"error: HTTP 501: {}"),
        (b"HTTP/1.1 200 OK\r\n\r\n[]", b"error: the sidecar's answer is no inbox: []"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 99999, b"error: the sidecar's answer is no inbox: [["),
    ],
)
def test_follow_ends_on_an_answer_that_is_no_inbox(answer: bytes, message: bytes) -> None:
    with answering(answer) as url, following(url) as process:
        assert process.stderr is not None
        assert process.wait(20) == 1
        assert process.stderr.read().startswith(message)


@given(st.binary(max_size=200))
def test_no_answer_raises_anything_but_the_clients_error(noise: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 2" + noise)
        theirs.shutdown(socket.SHUT_WR)
        try:
            _Answer(ours, time.monotonic() + 10).read()
        except (ValueError, EOFError, SidecarClientError):
            return
