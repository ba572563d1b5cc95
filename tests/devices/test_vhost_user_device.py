"""The vhost-user front end: a device that another program serves, and programs that lie."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from echo_device import EchoDevice, Served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmio_driver import MmioDriver
from virtio_driver import WAIT, DriverQueue, GuestRam, guest_ram

from voidbus.vm.devices.device import F_VERSION_1, RING_FEATURES
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.memory import GuestMemory
from voidbus.vm.devices.vhost_user_back_end import BackEnd
from voidbus.vm.devices.vhost_user_device import VhostUserDevice
from voidbus.vm.devices.vhost_user_messages import (
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    PROTOCOL_F_MQ,
    PROTOCOL_F_REPLY_ACK,
    Request,
)

SIZE = 16
LAST_RING = 1


class ServedElsewhere(VhostUserDevice):
    """The echo device, as a machine of ours has it."""

    device_id: ClassVar[int] = EchoDevice.device_id


def device(
    sock: socket.socket, memory: GuestMemory, ram: GuestRam, answer_seconds: float = WAIT
) -> ServedElsewhere:
    return ServedElsewhere(
        b"configuration",
        (64, 64),
        BackEnd(sock, answer_seconds),
        memory,
        ram.shared,
        ending=lambda: "exit code 7",
        patience=answer_seconds,
    )


class Rig:
    """A machine's registers, our front end behind them, and our back end behind that."""

    def __init__(self, path: Path, ram: GuestRam, stack: contextlib.ExitStack) -> None:
        self.served = Served(path)
        stack.callback(self.served.close)
        memory = ram.memory()
        stack.callback(memory.close)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(path))
        self.driver = MmioDriver(device(sock, memory, ram), ram)
        stack.callback(self.driver.close)
        self.queue = DriverQueue(ram, SIZE)
        stack.callback(self.queue.close)
        self.other = DriverQueue(ram, SIZE)
        stack.callback(self.other.close)

    def start(self) -> None:
        self.driver.start([self.queue, self.other])

    def echo(self, content: bytes) -> bytes:
        self.queue.add([content], [100])
        self.queue.kick()
        (done,) = self.queue.wait()
        return done.data


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with guest_ram() as made:
        yield made


@pytest.fixture
def rig(tmp_path: Path, ram: GuestRam) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        yield Rig(tmp_path / "vhost", ram, stack)


# -- by the rules -------------------------------------------------------------------------


def test_a_driver_of_ours_is_served_by_another_program(rig: Rig) -> None:
    rig.start()
    assert rig.driver.offered() & RING_FEATURES == RING_FEATURES
    assert rig.driver.read(0x100, 4) == int.from_bytes(b"conf", "little")
    for content in (b"one", b"two" * 30):
        assert rig.echo(content) == content
    assert not rig.driver.failures


def test_what_the_back_end_does_not_offer_is_not_offered(rig: Rig) -> None:
    assert not rig.driver.offered() & F_PROTOCOL_FEATURES
    rig.start()
    assert rig.served.device.calls[:3] == ["attach", "negotiated", "start 0"]


def test_a_queue_with_event_indices_and_indirect_descriptors_works_too(
    rig: Rig, ram: GuestRam
) -> None:
    with contextlib.ExitStack() as stack:
        queues = [DriverQueue(ram, SIZE, event_idx=True, indirect=True) for _ in range(2)]
        for each in queues:
            stack.callback(each.close)
        rig.driver.start(queues)
        queues[0].add([b"a", b"bc"], [2, 2])
        queues[0].kick()
        assert [done.data for done in queues[0].wait()] == [b"abc"]


def test_a_driver_that_resets_begins_anew(rig: Rig) -> None:
    for content in (b"first", b"second"):
        rig.start()
        assert rig.echo(content) == content
        rig.driver.write(0x70, 0)
        rig.queue.restart()
        rig.other.restart()
    rig.driver.settled()
    calls = rig.served.device.calls
    assert calls.count("start 0") == calls.count("stop 0") == 2
    assert not rig.driver.failures


def test_the_end_of_the_machine_is_the_end_of_the_connection(rig: Rig) -> None:
    rig.start()
    rig.echo(b"x")
    rig.driver.close()
    rig.served.quiet()
    assert rig.served.device.calls[-1] == "reset"
    assert not rig.driver.failures


def test_who_waits_for_an_answer_when_the_machine_ends_waits_no_longer(ram: GuestRam) -> None:
    asked = threading.Event()
    with contextlib.ExitStack() as stack:
        answer = but(Request.SET_MEM_TABLE, lambda _: asked.set())
        liar = stack.enter_context(lying(answer))
        memory = ram.memory()
        stack.callback(memory.close)
        made = device(liar.ours, memory, ram, answer_seconds=1000 * WAIT)
        driver = MmioDriver(made, ram)
        queues = [DriverQueue(ram, SIZE) for _ in range(2)]
        for each in queues:
            stack.callback(each.close)
        starting = threading.Thread(target=lambda: driver.start(queues))
        starting.start()
        assert asked.wait(WAIT)
        made.hang_up()
        driver.close()
        starting.join(WAIT)
        assert not starting.is_alive()
        assert liar.was_left()
        assert Request.SET_VRING_KICK not in liar.asked, "no descriptor goes out after that"


# -- a back end that fails ----------------------------------------------------------------


def test_a_back_end_that_goes_ends_the_device_with_its_end(rig: Rig) -> None:
    rig.start()
    rig.echo(b"x")
    rig.served.close()
    assert rig.driver.failure() == (
        "vhost-user: the back end has gone, or speaks unasked (exit code 7)"
    )


def test_a_queue_outside_of_memory_ends_the_device(rig: Rig) -> None:
    rig.driver.negotiate(F_VERSION_1)
    rig.driver.write(0x30, 0)
    rig.driver.write(0x38, SIZE)
    rig.driver.write(0x80, 0xFFFF_F000)
    rig.driver.write(0x44, 1)
    rig.driver.write(0x70, rig.driver.status | 4)
    assert rig.driver.failure() == "256 bytes at 0xfffff000 are not guest memory"


Answer = Callable[[int, bytes], bytes | None]


def reply(request: int, payload: bytes) -> bytes:
    return HEADER.pack(request, 1 | FLAG_REPLY, len(payload)) + payload


def number(request: int, value: int) -> bytes:
    return reply(request, struct.pack("<Q", value))


def honest(request: int, payload: bytes) -> bytes | None:
    """What a back end answers that does nothing."""
    match request:
        case Request.GET_FEATURES:
            return number(request, F_PROTOCOL_FEATURES | RING_FEATURES)
        case Request.GET_PROTOCOL_FEATURES:
            return number(request, PROTOCOL_F_REPLY_ACK | PROTOCOL_F_MQ)
        case Request.GET_QUEUE_NUM:
            return number(request, 2)
        case Request.GET_VRING_BASE:
            return reply(request, payload)
        case Request.SET_PROTOCOL_FEATURES:
            return None
    return number(request, 0)


class Liar:
    """A back end in a thread of its own that answers as it is told."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.ours, self._theirs = socket.socketpair()
        self.asked: list[int] = []
        self._thread = threading.Thread(target=self._serve, name="liar")
        self._thread.start()

    def _serve(self) -> None:
        with self._theirs, contextlib.suppress(OSError):
            while True:
                header, fds, _, _ = socket.recv_fds(self._theirs, HEADER.size, 8)
                for fd in fds:
                    os.close(fd)
                if len(header) < HEADER.size:
                    return
                request, _flags, size = HEADER.unpack(header)
                self.asked.append(request)
                payload = self._theirs.recv(size, socket.MSG_WAITALL) if size else b""
                answer = self._answer(request, payload)
                if answer is not None:
                    self._theirs.sendall(answer)

    def say(self, data: bytes) -> bool:
        """Whether somebody still hears it."""
        try:
            self._theirs.sendall(data)
        except OSError:
            return False
        return True

    def was_left(self) -> bool:
        """Whether the connection ends."""
        self._thread.join(WAIT)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.ours.close()
        assert self.was_left()


@contextlib.contextmanager
def lying(answer: Answer) -> Iterator[Liar]:
    made = Liar(answer)
    try:
        yield made
    finally:
        made.close()


def but(request: Request, answer: Callable[[bytes], bytes | None]) -> Answer:
    """Honest, but for one message."""

    def answers(asked: int, payload: bytes) -> bytes | None:
        return answer(payload) if asked == request else honest(asked, payload)

    return answers


GREETINGS: dict[str, tuple[Answer, str]] = {
    "no virtio 1": (
        but(Request.GET_FEATURES, lambda _: number(1, F_PROTOCOL_FEATURES)),
        "it offers the features 0x40000000, and 0x140000000 are needed",
    ),
    "no protocol features": (
        but(Request.GET_FEATURES, lambda _: number(1, F_VERSION_1)),
        "it offers the features 0x100000000, and 0x140000000 are needed",
    ),
    "no acknowledgements": (
        but(Request.GET_PROTOCOL_FEATURES, lambda _: number(15, PROTOCOL_F_MQ)),
        "it acknowledges no message",
    ),
    "one queue": (
        but(Request.GET_QUEUE_NUM, lambda _: number(17, 1)),
        "it has 1 queues, and 2 are needed",
    ),
    "another message": (
        but(Request.GET_FEATURES, lambda _: number(2, 0)),
        "it answered GET_FEATURES with message 2, flags 0x5 and 8 bytes",
    ),
    "no reply": (
        but(Request.GET_FEATURES, lambda _: HEADER.pack(1, 1, 8) + bytes(8)),
        "it answered GET_FEATURES with message 1, flags 0x1 and 8 bytes",
    ),
    "an endless reply": (
        but(Request.GET_FEATURES, lambda _: HEADER.pack(1, 5, 0xFFFF_FFFF)),
        "it answered GET_FEATURES with message 1, flags 0x5 and 4294967295 bytes",
    ),
    "refuses an owner": (
        but(Request.SET_OWNER, lambda _: number(3, 1)),
        "it refused message SET_OWNER",
    ),
}


@pytest.mark.parametrize("what", GREETINGS)
def test_a_back_end_that_can_not_serve_is_refused_with_what_it_lacks(
    what: str, ram: GuestRam
) -> None:
    answer, message = GREETINGS[what]
    memory = ram.memory()
    with lying(answer) as liar, contextlib.closing(memory):
        with pytest.raises(DeviceError) as caught:
            device(liar.ours, memory, ram)
        assert str(caught.value).startswith(f"vhost-user: {message}")
        assert str(caught.value).endswith(" (exit code 7)")
        assert liar.was_left()


def test_a_back_end_that_does_not_answer_is_given_up(ram: GuestRam) -> None:
    memory = ram.memory()
    late = pytest.raises(DeviceError, match=r"message GET_FEATURES: no answer in time")
    with lying(lambda *_: None) as liar, contextlib.closing(memory), late:
        device(liar.ours, memory, ram, answer_seconds=0.01)


def test_a_back_end_that_answers_byte_by_byte_has_no_more_time_than_another(
    ram: GuestRam,
) -> None:
    memory = ram.memory()
    pause = threading.Event()
    heard = []

    def drip(_: bytes) -> bytes:
        """Bytes of the answer, one after the other, each well before a wait for one is over."""
        for byte in number(1, F_PROTOCOL_FEATURES | RING_FEATURES):
            heard.append(liar.say(bytes([byte])))
            pause.wait(0.04)
        return b""

    late = pytest.raises(DeviceError, match=r"message GET_FEATURES: no answer in time")
    with lying(but(Request.GET_FEATURES, drip)) as liar, contextlib.closing(memory), late:
        device(liar.ours, memory, ram, answer_seconds=0.1)
    assert not all(heard)


RINGS: dict[str, tuple[Answer, str]] = {
    "refuses memory": (
        but(Request.SET_MEM_TABLE, lambda _: number(5, 1)),
        "it refused message SET_MEM_TABLE",
    ),
    "refuses a kick": (
        but(Request.SET_VRING_KICK, lambda _: number(12, 22)),
        "it refused message SET_VRING_KICK",
    ),
    "speaks unasked": (
        but(
            Request.SET_VRING_ENABLE,
            lambda ring: number(18, 0) * (2 if ring[0] == LAST_RING else 1),
        ),
        "the back end has gone, or speaks unasked",
    ),
}


@pytest.mark.parametrize("what", RINGS)
def test_a_back_end_that_fails_at_a_driver_ends_the_device(what: str, ram: GuestRam) -> None:
    answer, message = RINGS[what]
    with contextlib.ExitStack() as stack:
        liar = stack.enter_context(lying(answer))
        driver, queues = started(liar, ram, stack)
        driver.start(queues)
        assert driver.failure().startswith(f"vhost-user: {message}")


def test_a_back_end_that_stops_another_queue_ends_the_device(ram: GuestRam) -> None:
    answer = but(Request.GET_VRING_BASE, lambda _: reply(11, struct.pack("<II", 9, 0)))
    with contextlib.ExitStack() as stack:
        liar = stack.enter_context(lying(answer))
        driver, queues = started(liar, ram, stack)
        driver.start(queues)
        driver.write(0x70, 0)
        assert driver.failure().startswith("vhost-user: it stopped queue 9, and not 0")


def started(
    liar: Liar, ram: GuestRam, stack: contextlib.ExitStack
) -> tuple[MmioDriver, list[DriverQueue]]:
    memory = ram.memory()
    stack.callback(memory.close)
    driver = MmioDriver(device(liar.ours, memory, ram), ram)
    stack.callback(driver.close)
    queues = [DriverQueue(ram, SIZE) for _ in range(2)]
    for each in queues:
        stack.callback(each.close)
    return driver, queues


def test_a_back_end_is_told_of_memory_first_and_then_of_each_queue(ram: GuestRam) -> None:
    with contextlib.ExitStack() as stack:
        liar = stack.enter_context(lying(honest))
        driver, queues = started(liar, ram, stack)
        driver.start(queues)
        driver.settled()
        assert not driver.failures
        assert liar.asked[:5] == [1, 15, 16, 3, 17]
        ring = [8, 10, 9, 13, 12, 18]
        assert liar.asked[5:] == [2, 5, *ring, *ring]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    request_=st.sampled_from(sorted(Request)),
    junk=st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda request, flags, payload: HEADER.pack(request, flags, len(payload)) + payload,
            st.integers(0, 50),
            st.sampled_from([0, 1, 5, FLAG_NEED_REPLY | 5]),
            st.binary(max_size=24),
        ),
    ),
)
def test_whatever_a_back_end_answers_ends_the_device_at_worst(
    ram: GuestRam, request_: Request, junk: bytes
) -> None:
    with contextlib.ExitStack() as stack:
        liar = stack.enter_context(lying(but(request_, lambda _: junk)))
        memory = ram.memory()
        stack.callback(memory.close)
        try:
            made = device(liar.ours, memory, ram, answer_seconds=0.02)
        except DeviceError:
            return
        driver = MmioDriver(made, ram)
        stack.callback(driver.close)
        queues = [DriverQueue(ram, SIZE) for _ in range(2)]
        for each in queues:
            stack.callback(each.close)
        driver.start(queues)
        driver.write(0x70, 0)
        driver.loop.close()  # with whatever it has to say
        assert len(driver.failures) <= 1
        assert all(reason.startswith("vhost-user: ") for reason in driver.failures)
