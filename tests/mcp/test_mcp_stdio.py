"""void-mcp as a process on stdio, with a client that does what real ones do wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp_kit import INBOX, StdioMcp, call, folder_of_the_program, message, stdio_mcp, stuck_sidecar
from sidecar_kit import RunningSidecar, entry, running_sidecar

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def mcp(sidecar: RunningSidecar) -> Iterator[StdioMcp]:
    with stdio_mcp(sidecar.url) as client:
        yield client


def test_the_four_tools_reach_the_sidecar(mcp: StdioMcp, sidecar: RunningSidecar) -> None:
    begun = mcp.ask(message("initialize", 0, protocolVersion="2025-06-18"))
    assert begun["result"]["protocolVersion"] == "2025-06-18"
    mcp.send(message("notifications/initialized"))
    context = mcp.ask(call("read_shared_context", 1))["result"]
    assert context["structuredContent"]["role"] == "candidate"
    inbox_ = mcp.ask(call("read_peer_messages", 2, since=0))["result"]
    assert json.loads(inbox_["content"][0]["text"]) == inbox_["structuredContent"]
    assert [one["message_id"] for one in inbox_["structuredContent"]["entries"]] == ["a"]
    mcp.ask(call("broadcast_observation", 3, summary_text="grüße \ud83d\ude00"))
    mcp.ask(call("recommend_to_leader", 4, summary_text="no", disposition="reject"))
    first, second = sidecar.server.drain()
    assert (first.kind, first.audience, first.priority) == ("signal", "broadcast", "normal")
    assert first.payload == {"summary_text": "grüße 😀"}
    assert (second.kind, second.audience) == ("evaluation", "leader")


def test_the_sidecars_refusal_is_for_the_model_to_read(mcp: StdioMcp) -> None:
    for number in range(3):
        assert (
            "isError"
            not in mcp.ask(call("broadcast_observation", number, summary_text=f"{number}"))[
                "result"
            ]
        )
    refused = mcp.ask(call("broadcast_observation", 9, summary_text="x"))["result"]
    assert refused["isError"] is True
    assert "max intents per iteration" in refused["content"][0]["text"]


def test_each_message_is_answered_in_its_own_framing(mcp: StdioMcp) -> None:
    body = json.dumps(message("ping", 1)).encode()
    mcp.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    assert mcp.output.readline() == b"Content-Length: 36\r\n"
    assert mcp.output.readline() == b"\r\n"
    assert json.loads(mcp.output.read(36)) == {"jsonrpc": "2.0", "id": 1, "result": {}}
    assert mcp.ask(message("ping", 2))["result"] == {}


def test_what_real_clients_do_wrong_is_answered_or_passed_over(mcp: StdioMcp) -> None:
    mcp.write(b"\r\n\n")  # blank lines
    mcp.write(b"this is a log line\n")
    assert mcp.read()["error"]["code"] == -32700
    mcp.write(b"x" * 300_000 + b"\n")
    assert mcp.read()["error"]["code"] == -32600
    mcp.send(message("notifications/nonsense"), {"id": 1, "result": {}}, {"jsonrpc": "2.0"})
    assert mcp.read()["error"]["code"] == -32600
    mcp.write(b'{"id": 7, "method": "ping"}\r\n')  # no "jsonrpc", CRLF
    assert mcp.read() == {"jsonrpc": "2.0", "id": 7, "result": {}}
    mcp.send([message("ping", 1), message("notifications/initialized"), message("ping", 2)])
    assert [mcp.read()["id"], mcp.read()["id"]] == [1, 2]
    assert mcp.ask(message("prompts/list", 3))["error"]["code"] == -32601


def test_a_message_comes_in_pieces_and_the_last_without_a_line_end(mcp: StdioMcp) -> None:
    data = json.dumps(message("ping", "é")).encode()
    for byte in data:
        mcp.write(bytes([byte]))
    code, rest, errors = mcp.end()
    assert (code, json.loads(rest)["id"], errors) == (0, "é", b"")


def test_work_under_way_when_the_input_ends_is_still_answered(sidecar: RunningSidecar) -> None:
    with stdio_mcp(sidecar.url) as mcp:
        mcp.send(*(call("read_shared_context", number) for number in range(8)))
        code, rest, errors = mcp.end()
    answers = [json.loads(line) for line in rest.splitlines()]
    assert sorted(one["id"] for one in answers) == list(range(8))
    assert (code, errors) == (0, b"")


def test_a_cancelled_call_leaves_the_sidecar_at_once_and_is_not_answered() -> None:
    with stuck_sidecar() as stuck, stdio_mcp(stuck.url) as mcp:
        mcp.send(call("read_shared_context", "slow"))
        assert stuck.asked.wait(20)
        assert mcp.ask(message("ping", 1))["result"] == {}  # others are served meanwhile
        mcp.send(message("notifications/cancelled", requestId="slow", reason="enough"))
        assert stuck.left.wait(5)
        code, rest, _ = mcp.end()
        assert (code, rest) == (0, b"")


def test_a_sidecar_that_is_not_there_is_a_result_with_is_error() -> None:
    with stdio_mcp(NOWHERE) as mcp:
        result = mcp.ask(call("read_shared_context", 1))["result"]
        assert result["isError"] is True
        assert "can't connect to the sidecar" in result["content"][0]["text"]
        assert mcp.ask(message("resources/read", 2, uri=INBOX))["error"]["code"] == -32603


def test_a_subscriber_is_told_of_what_arrives_without_polling(
    mcp: StdioMcp, sidecar: RunningSidecar
) -> None:
    assert mcp.ask(message("resources/subscribe", 1, uri=INBOX))["result"] == {}
    sidecar.server.push_message(entry("m"))
    told = mcp.read()
    assert (told["method"], told["params"]) == ("notifications/resources/updated", {"uri": INBOX})
    text = mcp.ask(message("resources/read", 2, uri=INBOX))["result"]["contents"][0]["text"]
    assert [one["message_id"] for one in json.loads(text)["entries"]] == ["a", "m"]
    assert mcp.ask(message("resources/unsubscribe", 3, uri=INBOX))["result"] == {}
    while sidecar.server.followers():  # its request for signals is ended too
        mcp.ask(message("ping", 4))
    sidecar.server.push_message(entry("n"))
    assert mcp.ask(message("ping", 5))["result"] == {}


def test_a_subscription_outlives_a_restart_of_the_sidecar(
    mcp: StdioMcp, sidecar: RunningSidecar
) -> None:
    mcp.ask(message("resources/subscribe", 1, uri=INBOX))
    state, address = sidecar.server.snapshot(), sidecar.address
    sidecar.server.stop(10)
    told = mcp.read()
    assert (told["method"], told["params"]["level"]) == ("notifications/message", "warning")
    with running_sidecar(address, snapshot=state) as second:
        assert mcp.read()["params"]["level"] == "info"
        second.server.push_message(entry("m"))
        assert mcp.read()["method"] == "notifications/resources/updated"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_whatever_it_does(number: signal.Signals) -> None:
    with stuck_sidecar() as stuck, stdio_mcp(stuck.url) as mcp:
        mcp.send(call("read_shared_context", 1))
        assert stuck.asked.wait(20)
        mcp.process.send_signal(number)
        assert mcp.process.wait(10) == 0
        assert (mcp.output.read(), mcp.errors.read()) == (b"", b"")


def test_a_client_that_has_gone_ends_it(sidecar: RunningSidecar) -> None:
    with stdio_mcp(sidecar.url) as mcp:
        mcp.ask(message("ping", 1))
        mcp.output.close()
        mcp.send(message("ping", 2), message("ping", 3))
        mcp.input.close()
        assert mcp.process.wait(20) == 0
        assert mcp.errors.read() == b""


@pytest.mark.parametrize(
    ("arguments", "url", "says"),
    [
        ((), None, b"error: VOID_SIDECAR_URL not set\n"),
        (("--http",), None, b"error: VOID_SIDECAR_URL not set\n"),
        ((), "http://localhost:80", b"error: VOID_SIDECAR_URL must be http://IP:PORT"),
        (("--dance",), NOWHERE, b"error: unknown option: --dance"),
        (("--http", "--port"), NOWHERE, b"error: --port needs a number\n"),
        (("--http", "--port=70000"), NOWHERE, b"error: invalid port: 70000"),
        (("--http", "--port", "x"), NOWHERE, b"error: invalid port: x"),
        (("--probe", "1", "--http"), NOWHERE, b"error: --probe serves nothing"),
        (("--seconds", "1"), NOWHERE, b"error: --seconds is for --probe"),
        (("--port", "80"), NOWHERE, b"error: --port is for --http\n"),
    ],
)
def test_it_says_why_it_does_not_start_and_exits_with_1(
    arguments: tuple[str, ...], url: str | None, says: bytes
) -> None:
    with stdio_mcp(url, *arguments) as mcp:
        assert mcp.process.wait(20) == 1
        assert mcp.output.read() == b""
        assert mcp.errors.read().startswith(says)


def test_help_is_printed() -> None:
    with stdio_mcp(None, "--help") as mcp:
        code, text, _ = mcp.end()
    assert (code, text[:15]) == (0, b"usage: void-mcp")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with stdio_mcp(NOWHERE, "--http", "--port", port) as mcp:
            assert mcp.process.wait(20) == 1
            assert f"can't listen on 127.0.0.1:{port}".encode() in mcp.errors.read()


def test_a_probe_waits_until_a_port_accepts_connections() -> None:
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        port = str(late.getsockname()[1])
        with stdio_mcp(None, "--probe", port, "--seconds=20") as mcp:
            late.listen()
            assert mcp.end()[0] == 0


def test_a_probe_says_what_it_waited_for_in_vain() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        port = str(deaf.getsockname()[1])
        with stdio_mcp(None, "--probe", port, "--seconds", "0") as mcp:
            code, _, errors = mcp.end()
    assert (code, errors.decode().strip()) == (
        1,
        f"error: nothing accepts connections on 127.0.0.1:{port}",
    )


def test_it_runs_as_a_script_without_voidbus_installed(sidecar: RunningSidecar) -> None:
    # -S: no site-packages, so only the files beside it are found.
    script = [sys.executable, "-E", "-s", "-S", str(folder_of_the_program() / "void_mcp.py")]
    with stdio_mcp(sidecar.url, program=script) as mcp:
        assert mcp.ask(call("read_shared_context", 1))["result"]["content"]


def test_the_installed_program_works(sidecar: RunningSidecar) -> None:
    program = [str(Path(sys.executable).with_name("void-mcp"))]
    with stdio_mcp(sidecar.url, program=program) as mcp:
        assert mcp.ask(message("ping", 1))["result"] == {}


def test_it_loads_no_more_than_it_needs() -> None:
    script = (
        "import sys, voidbus.mcp.stdio, voidbus.mcp.http_server, voidbus.mcp.program\n"
        "heavy = {'ssl', 'email', 'asyncio', 'logging', 'http.client', 'pydantic', 'inspect'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=30, check=False, capture_output=True,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
