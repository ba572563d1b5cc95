"""CONFIGURE and what stands in for it: peers that know the message, and ones that don't."""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine_kit import WAIT, run

from voidbus.vm.channel import GuestChannel
from voidbus.vm.configure import GuestSettings, configure_guest
from voidbus.vm.connect import Connected, connect_guest
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.agent import Agent, Settings
from voidbus.vm.guest.configure_messages import (
    MAX_SEED,
    Configure,
    Configured,
    decode_configure,
    decode_configured,
    encode_configure,
    encode_configured,
)
from voidbus.vm.guest.connection import Connection
from voidbus.vm.guest.frames import ProtocolError
from voidbus.vm.guest.handshake import EVERYTHING, Flags
from voidbus.vm.guest.limits import Limits
from voidbus.vm.guest.rules import ALLOWLIST, LIMITS, Rules
from voidbus.vm.pty import PtyCall

SECRET = secrets.token_bytes(32)


class Guest:
    """An agent in this process that offers the given flags, and hosts connected to it."""

    def __init__(self, root: Path, flags: Flags) -> None:
        self.told: list[Configure] = []
        self.agent = Agent(
            Settings(SECRET, str(root), flags=flags, on_configure=self._configure), lambda _: None
        )
        self.agent.place.prepare()
        self._threads: list[threading.Thread] = []
        self._channels: list[GuestChannel] = []

    def _configure(self, message: Configure) -> tuple[str, ...]:
        self.told.append(message)
        return ("mount of /data: no such device",)

    def _serve(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=Connection(theirs, self.agent).run)
        thread.start()
        self._threads.append(thread)
        return ours

    def channel(self, flags: Flags = EVERYTHING) -> GuestChannel:
        def dial(timeout: float) -> Connected:
            return connect_guest(self._serve, SECRET, timeout, flags=flags, pong_wait=(WAIT, WAIT))

        self._channels.append(GuestChannel(dial(WAIT), dial=dial))
        return self._channels[-1]

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        self.agent.release()


MakeGuest = Callable[[Flags], Guest]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeGuest]:
    made: list[Guest] = []

    def build(flags: Flags) -> Guest:
        made.append(Guest(tmp_path, flags))
        return made[-1]

    yield build
    for guest in made:
        guest.close()


# -- both know it -------------------------------------------------------------------------


def test_nothing_runs_before_the_machine_is_configured(make: MakeGuest) -> None:
    channel = make(EVERYTHING).channel()
    refused = run(channel, "echo", "x")
    assert refused.error == "this machine is not configured yet, so nothing may run"
    with pytest.raises(ChannelFault, match="not configured yet"):
        channel.open_pty(PtyCall("echo"), lambda _: None, lambda _: None, WAIT)
    configure_guest(channel, GuestSettings(), WAIT)
    assert run(channel, "echo", "x").stdout == b"x\n"


def test_a_configured_machine_has_its_environment_and_its_allowlist(make: MakeGuest) -> None:
    guest = make(EVERYTHING)
    settings = GuestSettings(env=(("A", "b"),), allowed=("printenv",))
    warnings = configure_guest(guest.channel(), settings, WAIT)
    assert warnings == ("mount of /data: no such device",)
    later = guest.channel()  # another connection finds the same machine
    assert run(later, "printenv", "A").stdout == b"b\n"
    assert run(later, "sh").error == "Command 'sh' is not in the allowed commands list"


def test_the_guest_is_told_the_time_and_random_bytes(make: MakeGuest) -> None:
    guest = make(EVERYTHING)
    configure_guest(guest.channel(), GuestSettings(), WAIT)
    (told,) = guest.told
    assert len(told.seed) == 64
    assert told.clock is not None


def test_a_machine_is_configured_once(make: MakeGuest) -> None:
    guest = make(EVERYTHING)
    configure_guest(guest.channel(), GuestSettings(allowed=("echo",)), WAIT)
    with pytest.raises(ChannelFault, match="configured already") as caught:
        configure_guest(guest.channel(), GuestSettings(), WAIT)
    assert caught.value.reason == FaultReason.REFUSED
    assert run(guest.channel(), "cat").exit_code == -1


def test_a_file_does_not_decide_for_a_host_that_configures(make: MakeGuest) -> None:
    channel = make(EVERYTHING).channel()
    channel.write_file(ALLOWLIST, b'["cat"]', WAIT)
    configure_guest(channel, GuestSettings(allowed=("echo",)), WAIT)
    assert run(channel, "cat").exit_code == -1
    assert run(channel, "echo").exit_code == 0


# -- one side knows only the base protocol ------------------------------------------------


def test_a_guest_that_knows_only_the_base_protocol_is_configured_by_files(
    make: MakeGuest, tmp_path: Path
) -> None:
    channel = make(Flags.MULTIPLEX).channel()
    settings = GuestSettings(env=(("A", "b"), ("C", "d")), allowed=("printenv",))
    assert configure_guest(channel, settings, WAIT) == ()
    assert json.loads((tmp_path / ALLOWLIST[1:]).read_bytes()) == ["printenv"]
    assert run(channel, "printenv", "A").stdout == b"b\n"
    assert run(channel, "cat").error == "Command 'cat' is not in the allowed commands list"


def test_limits_reach_such_a_guest_under_the_protocols_names(
    make: MakeGuest, tmp_path: Path
) -> None:
    channel = make(Flags.MULTIPLEX).channel()
    configure_guest(channel, GuestSettings(limits=Limits(2048, 99, 5000)), WAIT)
    written = json.loads((tmp_path / LIMITS[1:]).read_bytes())
    assert written["max_open_files"] == 2048
    assert written["max_processes"] == 99
    assert written["max_file_size"] == 5000


def test_a_terminal_gets_the_environment_the_channel_adds(make: MakeGuest) -> None:
    channel = make(Flags.MULTIPLEX).channel()
    configure_guest(channel, GuestSettings(env=(("A", "machine"), ("B", "machine"))), WAIT)
    seen: list[bytes] = []
    ended = threading.Event()
    call = PtyCall("sh", ("-c", "echo $A $B"), env=(("B", "call"),))
    channel.open_pty(call, seen.append, lambda _: ended.set(), WAIT)
    assert ended.wait(WAIT)
    assert b"machine call" in b"".join(seen)


def test_a_host_that_knows_only_the_base_protocol_needs_no_configure(make: MakeGuest) -> None:
    guest = make(EVERYTHING)
    channel = guest.channel(Flags.MULTIPLEX)
    channel.write_file(ALLOWLIST, b'["echo"]', WAIT)
    assert run(channel, "echo", "x").stdout == b"x\n"
    assert run(channel, "cat").exit_code == -1
    # What its files have decided stays.
    with pytest.raises(ChannelFault, match="configured already"):
        configure_guest(guest.channel(), GuestSettings(), WAIT)


# -- the rules ----------------------------------------------------------------------------


def rules(folder: Path, taken: list[Limits]) -> Rules:
    def take(limits: Limits) -> list[str]:
        taken.append(limits)
        return []

    (folder / "etc/voidbox").mkdir(parents=True)
    return Rules(None, decided=False, path=lambda path: str(folder) + path, take=take)


def test_the_limits_file_is_in_force_before_the_first_program(tmp_path: Path) -> None:
    taken: list[Limits] = []
    found = rules(tmp_path, taken)
    (tmp_path / LIMITS[1:]).write_text('{"max_virtual_memory": 1, "max_open_files": 2000}')
    assert found.refusal("echo", told=False) is None
    assert taken == [Limits(open_files=2000)]


@pytest.mark.parametrize("text", ["{", "[]", '{"max_processes": -1}', '{"max_processes": "x"}'])
def test_a_broken_limits_file_lets_nothing_run(tmp_path: Path, text: str) -> None:
    found = rules(tmp_path, [])
    (tmp_path / LIMITS[1:]).write_text(text)
    assert "so nothing may run" in (found.refusal("echo", told=False) or "")


def test_a_machine_without_its_root_runs_nothing(tmp_path: Path) -> None:
    found = rules(tmp_path, [])
    found.blocked = "nothing may run here"
    found.decide(None, None)
    assert found.refusal("echo", told=True) == "nothing may run here"


# -- the messages -------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=10)
SIZES = st.integers(1, 2**40)


@given(
    st.builds(
        Configure,
        st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
        st.none() | st.lists(TEXT, max_size=3).map(tuple),
        st.none() | st.builds(Limits, SIZES, SIZES, SIZES),
        st.binary(max_size=64),
        st.none() | st.floats(0, 2**33, exclude_max=True),
    )
)
def test_a_configure_arrives_as_it_was_sent(message: Configure) -> None:
    assert decode_configure(encode_configure(message)) == message


@given(st.builds(Configured, st.lists(TEXT, max_size=3).map(tuple), st.none() | TEXT))
def test_a_configured_arrives_as_it_was_sent(message: Configured) -> None:
    assert decode_configured(encode_configured(message)) == message


@pytest.mark.parametrize(
    "body",
    [
        b'{"limits":[]}',
        b'{"limits":{"open_files":0}}',
        b'{"seed":"xy"}',
        b'{"seed":"%s"}' % (b"00" * (MAX_SEED + 1)),
        b'{"clock":-1}',
        b'{"clock":true}',
        b'{"clock":1e99}',
        b'{"allowed":"all"}',
        b'{"env":{"a":"b"}}',
    ],
)
def test_a_configure_that_makes_no_sense_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_configure(body)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_configure_or_a_protocol_error(body: bytes) -> None:
    for decode in (decode_configure, decode_configured):
        try:
            decode(body)
        except ProtocolError:
            continue
