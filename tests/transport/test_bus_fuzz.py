"""Bytes nobody should send, over live sockets: the hub lives on, counts them, keeps its size."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zmq
from raw_dealer import raw_socket
from transport_kit import WIRES, Answer, Bus, Echo, Look, Signal, Work

from voidbus.transport.access import ipc_endpoints, secure_directory
from voidbus.transport.address import AddressError
from voidbus.transport.admission import token_digest
from voidbus.transport.control import Hello
from voidbus.transport.envelope import Envelope, Kind, read_envelope
from voidbus.transport.message import Right
from voidbus.transport.packing import pack
from voidbus.transport.topics import PREFIX_LIMIT

MESSAGES = 600


@pytest.fixture
def hub_bus(wire_bus: Bus) -> Bus:
    wire_bus.hub.attach("echo", Echo())
    return wire_bus


def check_unharmed(bus: Bus) -> None:
    """A client gets its answer, on a link of its own, and nothing went wrong on our side."""
    client = bus.leaf("client-after")
    with pytest.raises(AddressError):
        client.subscribe("x" * (PREFIX_LIMIT + 1), Signal())
    for number in range(20):
        answer = client.ask("hub/echo", Look(text=str(number)), timeout=10).result()
        assert answer == Answer(text=str(number))
    news = Signal()
    assert client.subscribe("fuzz-news", news).wait_ready(10)
    bus.hub.publish("fuzz-news", Look(text="x"))
    news.wait(lambda seen: len(seen) == 1, timeout=10)
    assert bus.hub.counters["frames_raised"] == 0
    assert bus.hub.counters["callbacks_raised"] == 0


def dealer(bus: Bus, right: Right) -> zmq.Socket[bytes]:
    made = raw_socket(bus, zmq.DEALER)
    made.connect(bus.hub.addresses[right])
    return made


def drain(peer: zmq.Socket[bytes]) -> None:
    """Everything sent before was read by the hub: it answers in order."""
    peer.send_multipart(Envelope(Kind.PING, "hub/", "x/").frames())
    while read_envelope(peer.recv_multipart()).kind not in (Kind.UNKNOWN_LINK, Kind.PONG):
        pass


def random_frames(rng: random.Random) -> list[bytes]:
    sizes = (0, 1, 7, 40, 300, 5000)
    return [rng.randbytes(rng.choice(sizes)) for _ in range(rng.choice((1, 1, 1, 2, 5, 40)))]


def mutated(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """An envelope with some bytes changed, cut out, doubled, or frames added."""
    first = bytearray(frames[0])
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(first) + 1)
        what = rng.randrange(4)
        if what == 0 and position < len(first):
            first[position] = rng.randrange(256)
        elif what == 1:
            del first[position : position + rng.randint(1, 20)]
        elif what == 2:
            first[position:position] = rng.randbytes(rng.randint(1, 20))
        else:
            first[position:position] = first[position : position + 30]
    rest = [rng.randbytes(rng.randint(0, 99)) for _ in range(rng.choice((0, 0, 1, 17)))]
    return [bytes(first), *frames[1:], *rest]


@pytest.mark.parametrize("right", list(Right))
def test_random_frames_from_a_stranger_are_counted(hub_bus: Bus, right: Right) -> None:
    rng = random.Random(f"stranger {right}")
    with dealer(hub_bus, right) as peer:
        for _ in range(MESSAGES):
            peer.send_multipart(random_frames(rng))
        drain(peer)
    assert hub_bus.hub.counters["malformed"] == MESSAGES
    check_unharmed(hub_bus)


@pytest.mark.parametrize("right", list(Right))
def test_envelopes_with_a_few_wrong_bytes_from_a_known_link_harm_nobody(
    hub_bus: Bus, right: Right
) -> None:
    rng = random.Random(f"link {right}")
    name = "run-9" if right is Right.WORK else "client-9"
    hub_bus.hub.expect("run-9", token_digest("t"), 0)
    hub_bus.leaf("run-1", Right.WORK).attach("echo", Echo())
    hello = Hello(node=name, instance=9, token="t").to_json()
    greeting = Envelope(Kind.HELLO, "hub/", f"{name}/", tag=Hello.tag, body=hello)
    message = Work if right is Right.WORK else Look
    seeds = [
        greeting.frames(),
        *(
            Envelope(
                kind,
                dest,
                f"{name}/x",
                origin=9,
                sequence=number,
                tag=message.tag,
                deadline=1e11,
                key="k",
                body=b'{"text": "x"}',
                attachments=[b"raw"],
            ).frames()
            for number, kind in enumerate(Kind)
            for dest in ("hub/echo", "run-1/echo", f"{name}/news")
        ),
    ]
    seeds += [pack([one[0], other[0]]) for one, other in pairwise(seeds)]
    with dealer(hub_bus, right) as peer:
        for number in range(MESSAGES):
            if number % 50 == 0:  # what was sent may have been a goodbye
                peer.send_multipart(greeting.frames())
            peer.send_multipart(mutated(rng, rng.choice(seeds)))
            with contextlib.suppress(zmq.Again):
                while True:
                    peer.recv_multipart(zmq.NOBLOCK)
        drain(peer)
    assert hub_bus.hub.counters["malformed"] > 0
    check_unharmed(hub_bus)


def test_subscriptions_nobody_should_send_harm_nobody(hub_bus: Bus) -> None:
    rng = random.Random("subscriptions")
    for number in range(10):
        hub_bus.hub.publish(f"events/{number}", Look())
    with raw_socket(hub_bus, zmq.XSUB) as peer:
        peer.connect(hub_bus.hub.topics_address)
        for _ in range(MESSAGES):
            kind = rng.choice((b"\x01", b"\x00", b"\x02", b"\xff", b""))
            text = rng.choice((b"events/", b"\xff\xfe", b"", b"\0" * 9, rng.randbytes(200)))
            peer.send_multipart([kind + text, *[b"x"] * rng.choice((0, 0, 1, 20))])
        peer.send(b"\x01the-end")
        while peer.recv_multipart()[0].partition(b"\0")[0] != b"the-end":
            pass
    assert hub_bus.hub.counters["malformed"] > 0
    check_unharmed(hub_bus)


def test_a_prefix_that_is_too_long_costs_its_subscriber_the_connection(hub_bus: Bus) -> None:
    """libzmq keeps a node of a tree for each byte of a prefix, and frees them by recursion."""
    for size in (2000, 20_000):  # one of 16 MiB would overflow the stack of this process too
        peer = raw_socket(hub_bus, zmq.XSUB)
        monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        peer.connect(hub_bus.hub.topics_address)
        peer.send(b"\x01" + b"x" * size)
        gave_up = monitor.poll(10_000)
        peer.disable_monitor()
        monitor.close(linger=0)
        peer.close()
        assert gave_up, "the hub did not give the connection up"
    check_unharmed(hub_bus)


def greeting_of_zmtp() -> bytes:
    """A greeting of ZMTP 3.1 with the NULL mechanism (https://rfc.zeromq.org/spec/37/)."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16 + 32)


def raw_connections(bus: Bus) -> Iterator[Callable[[], socket.socket]]:
    for url in (*bus.hub.addresses.values(), bus.hub.topics_address):

        def connect(url: str = url) -> socket.socket:
            if url.startswith("ipc://"):
                made = socket.socket(socket.AF_UNIX)
                made.connect(url.removeprefix("ipc://"))
            else:
                host, _, port = url.removeprefix("tcp://").rpartition(":")
                made = socket.create_connection((host, int(port)))
            made.settimeout(10.0)
            return made

        yield connect


@pytest.mark.parametrize("transport", WIRES)
def test_bytes_that_are_not_even_zeromq_harm_nobody(tmp_path: Path, transport: str) -> None:
    rng = random.Random(transport)
    bus = Bus(transport, tmp_path)
    try:
        bus.hub.attach("echo", Echo())
        for connect in raw_connections(bus):
            for number in range(25):
                with connect() as peer, contextlib.suppress(OSError):
                    start = (b"", greeting_of_zmtp(), b"GET / HTTP/1.1\r\n\r\n")[number % 3]
                    peer.sendall(start + rng.randbytes(rng.choice((0, 3, 64, 9000))))
        check_unharmed(bus)
    finally:
        bus.close()


_HUB = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from transport_kit import Echo
from voidbus.transport.access import ipc_endpoints
from voidbus.transport.hub import Hub
hub = Hub("hub", ipc_endpoints(Path(sys.argv[2])))
hub.attach("echo", Echo())
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(dict(hub.counters)), flush=True)
hub.close()
"""


class HubProcess:
    """A hub in a process of its own, whose size is its own."""

    def __init__(self, directory: Path) -> None:
        kits = str(Path(__file__).parents[1] / "kits")
        self.urls = ipc_endpoints(secure_directory(directory))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HUB, kits, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def counters(self) -> dict[str, int]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        counted: dict[str, int] = json.loads(self._line())
        return counted

    def resident(self) -> int:
        """Bytes (proc_pid_statm(5), in pages)."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    def close(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture
def hub_process(tmp_path: Path) -> Iterator[HubProcess]:
    hub = HubProcess(tmp_path / "bus")
    yield hub
    hub.close()


def many_small_frames(peer: zmq.Socket[bytes]) -> None:
    peer.send_multipart([b""] * 20_000)


def many_large_frames(peer: zmq.Socket[bytes]) -> None:
    frame = bytes(1024 * 1024)
    for _ in range(63):
        peer.send(frame, zmq.SNDMORE)
    peer.send(frame)


def many_large_messages(peer: zmq.Socket[bytes]) -> None:
    for _ in range(40):
        peer.send_multipart([bytes(2 * 1024 * 1024), b"x"])


def an_unfinished_message(peer: zmq.Socket[bytes]) -> None:
    frame = bytes(1024 * 1024)
    for _ in range(64):
        peer.send(frame, zmq.SNDMORE)


@pytest.mark.parametrize(
    "attack", [many_small_frames, many_large_frames, many_large_messages, an_unfinished_message]
)
def test_what_huge_messages_take_up_is_given_back(
    hub_process: HubProcess, attack: Callable[[zmq.Socket[bytes]], None]
) -> None:
    sizes = []
    with zmq.Context() as context:
        for round_ in range(5):
            for right in Right:
                with context.socket(zmq.DEALER) as peer:
                    peer.linger = 0
                    peer.rcvtimeo = 10_000
                    peer.connect(hub_process.urls.rights[right])
                    attack(peer)
                    if attack is not an_unfinished_message:
                        drain(peer)
            with context.socket(zmq.DEALER) as client:
                client.linger = 0
                client.rcvtimeo = 10_000
                client.connect(hub_process.urls.rights[Right.OBSERVE])
                drain(client)
            if round_:
                sizes.append(hub_process.resident())
    grown = (sizes[-1] - sizes[0]) / 1e6
    # Of twelve messages of up to 80 MB that came in between; of one an allocator's arena may be
    # left for a while.
    assert grown < 128, [round(size / 1e6) for size in sizes]
    assert max(sizes) < 400e6, [round(size / 1e6) for size in sizes]
    counters = hub_process.counters()
    assert "frames_raised" not in counters
    if attack is not an_unfinished_message:
        assert counters["malformed"] > 0
