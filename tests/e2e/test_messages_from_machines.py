"""A guest reaches its run's sidecar, by the vsock forward and through its network card."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator

import pytest
from machine_kit import WAIT, Guest, MakeGuest, Running, machines_of, run, shell
from mcp_kit import call, message
from patience import SLOW
from sidecar_kit import RunningSidecar, entry, inbox, running_sidecar

from voidbus.vm.channel import ExecCall
from voidbus.vm.machine import Machine

pytestmark = pytest.mark.timeout(300 * SLOW)


class Place:
    """A guest, the sidecar it reaches, and the address it reaches it at."""

    def __init__(self, guest: Guest, sidecar: RunningSidecar, url: str) -> None:
        self.guest = guest
        self.sidecar = sidecar
        self.url = url

    def void_message(self, *arguments: str) -> str:
        words = " ".join(f"'{argument}'" for argument in arguments)
        script = f"VOID_SIDECAR_URL={self.url} void-message {words}"
        result = shell(self.guest.channel, script).result()
        assert (result.exit_code, result.stderr) == (0, b"")
        return result.stdout.decode()

    def http(self, path: str, body: str | None = None) -> str:
        code = (
            "import sys, urllib.request as request\n"
            "data = sys.argv[2].encode() if len(sys.argv) > 2 else None\n"
            "asked = request.Request(sys.argv[1], data, {'Content-Type': 'application/json'})\n"
            "print(request.urlopen(asked, timeout=20).read().decode())"
        )
        words = () if body is None else (body,)
        result = run(self.guest.channel, "python3", "-c", code, self.url + path, *words)
        assert result.exit_code == 0, result.stderr
        return result.stdout.decode()


@pytest.fixture(
    scope="module",
    params=["vsock", pytest.param("card", marks=pytest.mark.needs("passt"))],
)
def place(
    request: pytest.FixtureRequest,
    kind: type[Machine],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    network = request.param == "card"
    folder = tmp_path_factory.mktemp("machine")
    with running_sidecar() as sidecar, machines_of(kind, folder) as make:
        assert not isinstance(sidecar.address, str)
        guest = make(network=network).start()
        host, port = sidecar.address
        if network:
            assert guest.machine.offer_host_port(port) == "10.0.2.2"
            url = f"http://10.0.2.2:{port}"
        else:
            assert guest.machine.offer_host_port(port) is None
            url = f"http://127.0.0.1:{guest.channel.listen_forward(0, (host, port), 20)}"
        yield Place(guest, sidecar, url)


def test_health_and_context_are_served_to_plain_http(place: Place) -> None:
    assert json.loads(place.http("/v1/health"))["status"] == "ok"
    assert json.loads(place.http("/v1/context"))["role"] == "candidate"


def test_the_inbox_is_read_and_an_intent_sent_by_plain_http(place: Place) -> None:
    place.sidecar.server.load_inbox(inbox("m1"))
    entries = json.loads(place.http("/v1/inbox"))["entries"]
    assert [entry["message_id"] for entry in entries] == ["m1"]
    intent = {
        "kind": "signal",
        "audience": "leader",
        "priority": "normal",
        "payload": {"summary_text": "by hand"},
    }
    accepted = json.loads(place.http("/v1/intents", json.dumps(intent)))
    (drained,) = place.sidecar.server.drain()
    assert drained.intent_id == accepted["intent_id"]
    assert drained.payload == {"summary_text": "by hand"}


def test_every_command_of_void_message_works(place: Place) -> None:
    place.sidecar.server.load_inbox(inbox("m1"))
    assert json.loads(place.void_message("health"))["status"] == "ok"
    assert json.loads(place.void_message("context"))["iteration"] == 1
    entries = json.loads(place.void_message("inbox"))["entries"]
    assert [entry["message_id"] for entry in entries] == ["m1"]
    sent = place.void_message(
        "send", "--kind", "evaluation", "--audience", "leader", "--summary", "good"
    )
    accepted = json.loads(sent)
    (drained,) = place.sidecar.server.drain()
    assert drained.intent_id == accepted["intent_id"]
    assert (drained.kind, drained.audience) == ("evaluation", "leader")
    assert drained.payload == {"summary_text": "good"}


def test_a_guest_follows_its_inbox_without_polling(place: Place) -> None:
    place.sidecar.server.load_inbox(inbox("m1"))
    script = f"VOID_SIDECAR_URL={place.url} exec void-message inbox --follow"
    following = shell(place.guest.channel, script, timeout=60)
    following.wait_for(b'"m1"')
    place.sidecar.server.push_message(entry("m2"))
    following.wait_for(b'"m2"')
    following.handle.signal(signal.SIGINT)
    result = following.result()
    assert (result.exit_code, result.stderr) == (130, b"")
    assert [json.loads(line)["message_id"] for line in result.stdout.splitlines()] == ["m1", "m2"]


def test_void_mcp_serves_its_tools_in_a_guest(place: Place) -> None:
    place.sidecar.server.load_inbox(inbox("m1"))
    asked = [
        message("initialize", 0, protocolVersion="2025-11-25"),
        call("read_peer_messages", 1),
        call("recommend_to_leader", 2, summary_text="good", disposition="refine"),
    ]
    lines = "\n".join(json.dumps(each) for each in asked)
    script = f"VOID_SIDECAR_URL={place.url} void-mcp <<'END'\n{lines}\nEND"
    result = shell(place.guest.channel, script).result()
    assert (result.exit_code, result.stderr) == (0, b"")
    answers = {one["id"]: one["result"] for one in map(json.loads, result.stdout.splitlines())}
    assert answers[0]["serverInfo"]["name"] == "void-mcp"
    entries = answers[1]["structuredContent"]["entries"]
    assert [entry["message_id"] for entry in entries] == ["m1"]
    (drained,) = place.sidecar.server.drain()
    assert (drained.kind, drained.audience) == ("evaluation", "leader")


def test_a_host_port_that_was_not_named_is_refused(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code = (
            "import socket, sys\n"
            "try:\n"
            "    socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)\n"
            "except OSError as error:\n"
            "    print(type(error).__name__)\n"
        )
        for address in ("127.0.0.1", "10.0.2.2"):
            result = run(place.guest.channel, "python3", "-c", code, address, str(port))
            assert result.stdout.strip() in (b"ConnectionRefusedError", b"OSError"), result
        other.settimeout(0)
        with pytest.raises(BlockingIOError):
            other.accept()


@pytest.mark.needs("passt")
def test_a_port_that_the_specification_names_is_reached_and_no_other(make: MakeGuest) -> None:
    code = (
        "import socket, sys\n"
        "try:\n"
        "    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as peer:\n"
        "        peer.sendall(b'from the guest')\n"
        "        print(peer.recv(100).decode())\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as named,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        named.settimeout(WAIT)
        other.settimeout(0)
        port, other_port = (server.getsockname()[1] for server in (named, other))
        guest = make(network=True, host_ports=frozenset({port})).start()

        def reach(address: str, port: int) -> Running:
            call = ExecCall("python3", ("-c", code, address, str(port)), timeout=60)
            return Running(guest.channel, call)

        reaching = reach("10.0.2.2", port)
        peer, _ = named.accept()
        with peer:
            peer.settimeout(WAIT)
            assert peer.recv(100) == b"from the guest"
            peer.sendall(b"from the host")
            assert reaching.result().stdout == b"from the host\n"
        assert reach("10.0.2.2", other_port).result().stdout == b"ConnectionRefusedError\n"
        # It is a port of the gateway, not of the guest's own loopback.
        assert reach("127.0.0.1", port).result().stdout == b"ConnectionRefusedError\n"
        with pytest.raises(BlockingIOError):
            other.accept()
