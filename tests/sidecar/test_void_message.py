"""void-message as a real process against a real sidecar, and the client under it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidecar_kit import RunningSidecar, answering, entry, inbox, running_sidecar

import voidbus.sidecar.client as client_module
import voidbus.sidecar.void_message as tool_module
from voidbus.sidecar.client import SidecarClient, SidecarClientError, parse_url

MODULE = [sys.executable, "-m", "voidbus.sidecar.void_message"]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tool as a guest has it: two files in a directory, and no voidbus."""
    directory = tmp_path_factory.mktemp("guest")
    for module in (client_module, tool_module):
        assert module.__file__
        shutil.copy(module.__file__, directory)
    # -S: no site-packages, so the voidbus package can't be found.
    return [sys.executable, "-S", str(directory / "void_message.py")]


@pytest.fixture
def sidecar() -> Iterator[RunningSidecar]:
    with running_sidecar() as running:
        yield running


def run(
    command: list[str], *arguments: str | bytes, url: str | None
) -> subprocess.CompletedProcess[bytes]:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    if url is not None:
        environment["VOID_SIDECAR_URL"] = url
    return subprocess.run(
        [*command, *arguments], capture_output=True, env=environment, timeout=30, check=False
    )


@pytest.mark.parametrize("form", ["module", "copied"])
def test_every_command_prints_the_raw_json_and_a_newline(
    form: str, copied: list[str], sidecar: RunningSidecar
) -> None:
    command = MODULE if form == "module" else copied
    sidecar.server.load_inbox(inbox("a", version=1))
    sidecar.server.push_message(entry("m", "grüße"))

    context = run(command, "context", url=sidecar.url)
    assert (context.returncode, context.stderr) == (0, b"")
    assert (
        context.stdout
        == json.dumps(sidecar.call("GET", "/v1/context")[1], separators=(",", ":")).encode() + b"\n"
    )

    whole = json.loads(run(command, "inbox", url=sidecar.url + "/").stdout)
    assert [one["message_id"] for one in whole["entries"]] == ["a", "m"]
    part = json.loads(run(command, "inbox", "--since", "1", url=sidecar.url).stdout)
    assert [one["payload"] for one in part["entries"]] == ["grüße"]

    assert json.loads(run(command, "health", url=sidecar.url).stdout)["status"] == "ok"

    sent = run(
        command,
        *("send", "--kind", "proposal", "--audience", "leader", "--summary", "use ü"),
        url=sidecar.url,
    )
    stamped = json.loads(sent.stdout)
    assert stamped["payload"] == {"summary_text": "use ü"}
    assert stamped["priority"] == "normal"
    assert [one.intent_id for one in sidecar.server.drain()] == [stamped["intent_id"]]


def test_the_installed_program_works(sidecar: RunningSidecar) -> None:
    program = Path(sys.executable).with_name("void-message")
    assert run([str(program)], "health", url=sidecar.url).returncode == 0
    assert run([str(program)], "nope", url=sidecar.url).returncode == 1


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help_needs_the_url_too(word: str, copied: list[str]) -> None:
    helped = run(copied, word, url="http://127.0.0.1:1")
    assert (helped.returncode, helped.stderr) == (0, b"")
    assert helped.stdout.startswith(b"usage: void-message")
    without = run(copied, word, url=None)
    assert (without.returncode, without.stdout) == (1, b"")
    assert without.stderr == b"error: VOID_SIDECAR_URL not set\n"


def test_no_arguments_give_the_usage_on_standard_error(copied: list[str]) -> None:
    result = run(copied, url="http://127.0.0.1:1")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.startswith(b"usage: void-message")


SEND = ("send", "--kind", "signal", "--audience", "leader", "--summary", "s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dance",), "unknown command: dance"),
        (("send",), "--kind is required"),
        (("send", "--kind", "signal"), "--audience is required"),
        (("send", "--kind", "signal", "--audience", "leader"), "--summary is required"),
        (("send", "--kind", "wish"), "invalid kind: wish"),
        (("send", "--kind", "signal", "--audience", "all"), "invalid audience: all"),
        ((*SEND, "--priority", "urgent"), "invalid priority: urgent"),
        ((*SEND, "--colour", "red"), "unknown option: --colour"),
        (("send", "--kind"), "--kind needs a value"),
        (("inbox", "--since", "soon"), "invalid since: soon"),
        (("context", "now"), "unknown option: now"),
    ],
)
def test_a_wrong_command_line_is_an_error(
    arguments: tuple[str, ...], message: str, copied: list[str]
) -> None:
    result = run(copied, *arguments, url="http://127.0.0.1:1")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode().startswith(f"error: {message}")


def test_an_http_error_is_shown_with_its_code_and_body(
    copied: list[str], sidecar: RunningSidecar
) -> None:
    result = run(copied, *SEND[:-1], "x" * 5000, url=sidecar.url)
    assert result.returncode == 1
    head, _, body = result.stderr.decode().partition(": {")
    assert head == "error: HTTP 413"
    assert json.loads("{" + body)["code"] == "PAYLOAD_TOO_LARGE"


def test_each_send_has_a_key_of_its_own(copied: list[str], sidecar: RunningSidecar) -> None:
    first = json.loads(run(copied, *SEND, url=sidecar.url).stdout)
    other = json.loads(run(copied, *SEND[:-1], "other", url=sidecar.url).stdout)
    assert first["intent_id"] != other["intent_id"]
    assert len(sidecar.server.snapshot().idempotency_keys) == 2


def test_an_argument_that_is_not_utf8_is_sent_with_replacements(
    copied: list[str], sidecar: RunningSidecar
) -> None:
    result = run(copied, *SEND[:-1], b"a\xffb", url=sidecar.url)
    assert json.loads(result.stdout)["payload"] == {"summary_text": "a\ufffdb"}


def test_nobody_listening_is_an_error(copied: list[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        result = run(copied, "health", url=f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: can't connect to the sidecar at 127.0.0.1:")


def test_a_reader_that_has_gone_is_no_traceback(copied: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*copied, "help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={"VOID_SIDECAR_URL": "http://127.0.0.1:1"},
        timeout=30,
        check=False,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


# The client


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://10.0.2.2:8080", ("10.0.2.2", 8080)),
        ("http://127.0.0.1:1/", ("127.0.0.1", 1)),
        ("http://[::1]:65535", ("::1", 65535)),
    ],
)
def test_a_url_of_a_literal_ip_and_a_port_is_taken(url: str, expected: tuple[str, int]) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "10.0.2.2:80",
        "https://10.0.2.2:80",
        "http://10.0.2.2",
        "http://localhost:80",
        "http://10.0.2.2:",
        "http://10.0.2.2:0",
        "http://10.0.2.2:65536",
        "http://10.0.2.2:8x",
        "http://10.0.2.2:80/v1",
        "http://10.0.2.2:80//",
        "http://::1:80",
        "http://user@10.0.2.2:80",
        "http://10.0.2.2:٣",
    ],
)
def test_any_other_url_is_refused(url: str) -> None:
    with pytest.raises(SidecarClientError, match="must be http://IP:PORT"):
        parse_url(url)


@given(st.text())
def test_no_url_raises_anything_else(text: str) -> None:
    try:
        parse_url(text)
    except SidecarClientError:
        return
    raise AssertionError(f"{text!r} was taken for a sidecar's URL")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500,
    ],
)
def test_an_answer_that_is_no_http_is_an_error(answer: bytes) -> None:
    with (
        answering(answer) as url,
        pytest.raises(SidecarClientError, match="no answer that can be read"),
    ):
        SidecarClient(url).request("GET", "/v1/health")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"])
def test_a_server_that_stalls_is_given_up(answer: bytes) -> None:
    with (
        answering(answer, stay_open=True) as url,
        pytest.raises(SidecarClientError, match=r"did not answer within 0\.2 s"),
    ):
        SidecarClient(url, read_timeout=0.2).request("GET", "/v1/health")


def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_RESPONSE_BYTES", 100)
    with (
        answering(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200) as url,
        pytest.raises(SidecarClientError, match="over 100 bytes"),
    ):
        SidecarClient(url).request("GET", "/v1/inbox")


def test_a_link_on_the_path_finds_the_client_beside_the_script(
    copied: list[str], sidecar: RunningSidecar, tmp_path: Path
) -> None:
    link = tmp_path / "void-message"
    link.symlink_to(copied[-1])
    assert run([sys.executable, "-S", str(link)], "health", url=sidecar.url).returncode == 0


def test_the_tool_and_the_models_load_no_more_than_they_need() -> None:
    script = (
        "import sys, voidbus.sidecar.void_message; assert 'pydantic' not in sys.modules\n"
        "import voidbus.sidecar.state; assert 'aiohttp' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=30, check=False)
    assert done.returncode == 0
