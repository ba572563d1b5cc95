"""The socket device against a guest's driver, packet by packet, on a loop turned by the test."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest
from virtio_driver import GuestRam
from vsock_guest import CID, GUEST_WINDOW, Bench, VsockGuest, bench

from voidbus.vm.devices import vsock
from voidbus.vm.devices.vsock import MAX_CONNECTIONS
from voidbus.vm.devices.vsock_connection import SMALL_WINDOW, WINDOW
from voidbus.vm.devices.vsock_packets import Op
from voidbus.vm.devices.vsock_to_guest import MAX_RESETS

PORT, HOST = 40000, 5000


@pytest.fixture(params=["flags", "event_idx", "indirect", "one buffer"])
def setup(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Every way a driver may use its queues; the last posts single buffers of 4 KiB in all."""
    ram = GuestRam()
    guest = VsockGuest(
        ram,
        event_idx=request.param in ("event_idx", "indirect"),
        indirect=request.param == "indirect",
        buffers=(4096,) if request.param == "one buffer" else (44, 4096),
    )
    made = Bench(ram, guest)
    yield made
    made.close()
    ram.close()


def received(sock: socket.socket) -> bytes | None:
    """What can be read now; None where nothing can, b"" at the end."""
    try:
        return sock.recv(1 << 20)
    except BlockingIOError:
        return None


# -- the guest connects -------------------------------------------------------------------


def test_a_guest_connects_talks_and_closes(setup: Bench) -> None:
    host = setup.accept(PORT, HOST)
    setup.guest.send(Op.RW, PORT, HOST, b"hello")
    assert setup.settle() == []
    assert received(host) == b"hello"
    host.send(b"hi")
    (packet,) = setup.settle()
    assert (packet.op, packet.data, packet.fwd_cnt) == (Op.RW, b"hi", 5)
    setup.guest.send(Op.SHUTDOWN, PORT, HOST, flags=3)
    (packet,) = setup.settle()
    assert packet.op == Op.RST
    assert received(host) == b""
    assert setup.device.stats.connections == 0
    assert setup.device.stats.resets == 0


def test_a_port_nobody_serves_is_refused(setup: Bench) -> None:
    setup.guest.send(Op.REQUEST, PORT, 9001)
    (packet,) = setup.settle()
    assert packet[:3] == (Op.RST, 9001, PORT)
    assert setup.device.stats.refused == 1


def test_a_guest_half_closes_and_still_receives(setup: Bench) -> None:
    host = setup.accept(PORT, HOST)
    setup.guest.send(Op.RW, PORT, HOST, b"last words")
    setup.guest.send(Op.SHUTDOWN, PORT, HOST, flags=2)
    assert setup.settle() == []
    assert received(host) == b"last words"
    assert received(host) == b""
    host.sendall(b"answer")
    assert [p.data for p in setup.settle()] == [b"answer"]
    host.close()
    (packet,) = setup.settle()
    assert (packet.op, packet.flags) == (Op.SHUTDOWN, 3)
    setup.guest.send(Op.RST, PORT, HOST)
    assert setup.settle() == []
    assert setup.device.stats.connections == 0


def test_the_host_half_closes_and_still_receives(setup: Bench) -> None:
    host = setup.accept(PORT, HOST)
    host.sendall(b"question")
    host.shutdown(socket.SHUT_WR)
    data, end = setup.settle()
    assert (data.data, end.op, end.flags) == (b"question", Op.SHUTDOWN, 2)
    setup.guest.send(Op.RW, PORT, HOST, b"answer")
    setup.settle()
    assert received(host) == b"answer"
    host.close()
    (end,) = setup.settle()
    assert (end.op, end.flags) == (Op.SHUTDOWN, 3)


def test_a_guest_that_hears_no_more_stops_the_host_from_sending(setup: Bench) -> None:
    host = setup.accept(PORT, HOST)
    setup.guest.send(Op.SHUTDOWN, PORT, HOST, flags=1)
    setup.settle()
    with pytest.raises(BrokenPipeError):
        host.send(b"x")
    setup.guest.send(Op.RW, PORT, HOST, b"still")
    setup.settle()
    assert received(host) == b"still"


def test_what_the_host_sent_before_it_closed_arrives(setup: Bench) -> None:
    host = setup.accept(PORT, HOST)
    host.sendall(b"z" * 100_000)
    host.close()
    *data, end = setup.settle()
    assert b"".join(p.data for p in data) == b"z" * 100_000
    assert (end.op, end.flags) == (Op.SHUTDOWN, 3)


def test_a_host_that_stopped_reading_is_told_to_the_guest_and_still_heard() -> None:
    with bench() as setup:
        host = setup.accept(PORT, HOST)
        host.shutdown(socket.SHUT_RD)
        setup.guest.send(Op.RW, PORT, HOST, b"x")
        (end,) = setup.settle()
        assert (end.op, end.flags) == (Op.SHUTDOWN, 1)
        setup.guest.send(Op.RW, PORT, HOST, b"was on its way")
        host.sendall(b"but listen")
        assert [p.data for p in setup.settle()] == [b"but listen"]


# -- the host connects --------------------------------------------------------------------


def test_the_host_connects_and_the_guest_accepts(setup: Bench) -> None:
    ports: list[int] = []

    def accepted(port: int) -> bool:
        ports.append(port)
        return True

    host = setup.host_connects(1024, on_accepted=accepted)
    host.sendall(b"early")
    (request,) = setup.settle()
    assert (request.op, request.guest_port, request.buf_alloc) == (Op.REQUEST, 1024, WINDOW)
    assert ports == []
    setup.guest.send(Op.RESPONSE, 1024, request.host_port)
    (packet,) = setup.settle()
    assert (packet.op, packet.data) == (Op.RW, b"early")
    assert ports == [request.host_port]


@pytest.mark.parametrize("answer", [Op.RST, Op.RW, Op.SHUTDOWN, Op.REQUEST, 77])
def test_a_guest_that_does_not_accept_closes_the_hosts_socket(answer: int) -> None:
    with bench() as setup:
        host = setup.host_connects(1024)
        (request,) = setup.settle()
        setup.guest.send(answer, 1024, request.host_port)
        packets = setup.settle()
        assert [p.op for p in packets] == ([] if answer == Op.RST else [Op.RST])
        assert received(host) == b""
        assert setup.device.stats.refused == 1


def test_a_host_that_gives_up_before_the_answer_is_forgotten(setup: Bench) -> None:
    setup.host_connects(1024).close()
    packets = setup.settle()
    assert [p.op for p in packets] in ([], [Op.REQUEST, Op.RST])
    assert setup.device.stats.connections == 0
    setup.guest.send(Op.RESPONSE, 1024, 1 << 30)
    assert [p.op for p in setup.settle()] == [Op.RST]


def test_a_guest_that_was_never_asked_is_not_told_of_the_end() -> None:
    with bench() as setup:
        setup.device.queue_stopped(vsock.RX)
        setup.host_connects(1024).close()
        setup.loop.settle()
        setup.device.queue_started(vsock.RX, setup.guest.rx.device_queue(setup.memory))
        setup.device.queue_notified(vsock.RX)
        assert setup.settle() == []


def test_an_answer_goes_before_the_data_that_came_earlier() -> None:
    with bench() as setup:
        used_up = setup.accept(1, HOST)
        used_up.sendall(bytes(200_000))
        setup.settle(fill=False)  # no buffer is left
        setup.guest.send(Op.REQUEST, PORT, HOST)
        setup.guest.send(Op.SHUTDOWN, PORT, HOST, flags=2)
        setup.settle(fill=False)
        setup.hosts[HOST][-1].sendall(b"early")
        setup.guest.fill()  # and no kick yet
        setup.loop.settle()
        got = [p.op for p in setup.settle() if p.guest_port == PORT]
        assert got == [Op.RESPONSE, Op.RW]


def test_a_guest_that_never_answers_loses_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "CONNECT_SECONDS", 0.0)
    monkeypatch.setattr(vsock, "_SWEEP_SECONDS", 0.0)
    with bench() as setup:
        host = setup.host_connects(1024)
        assert [p.op for p in setup.settle()] == [Op.REQUEST, Op.RST]
        assert received(host) == b""


def test_connections_wait_for_a_guest_that_has_no_driver_yet() -> None:
    with bench() as setup:
        setup.device.queue_stopped(vsock.RX)
        setup.host_connects(1024)
        assert setup.settle() == []
        setup.device.queue_started(vsock.RX, setup.guest.rx.device_queue(setup.memory))
        setup.device.queue_notified(vsock.RX)
        assert [p.op for p in setup.settle()] == [Op.REQUEST]


# -- credit -------------------------------------------------------------------------------


def test_the_host_is_read_only_as_far_as_the_guest_gave_credit(setup: Bench) -> None:
    host = setup.accept(PORT, HOST, buf_alloc=1000)
    host.sendall(b"a" * 5000)
    assert b"".join(p.data for p in setup.settle()) == b"a" * 1000
    setup.guest.send(Op.CREDIT_UPDATE, PORT, HOST, buf_alloc=1000, fwd_cnt=400)
    assert b"".join(p.data for p in setup.settle()) == b"a" * 400
    setup.guest.send(Op.CREDIT_UPDATE, PORT, HOST, buf_alloc=100_000, fwd_cnt=1400)
    assert b"".join(p.data for p in setup.settle()) == b"a" * 3600


@pytest.mark.parametrize(("alloc", "forwarded"), [(0, 0), (100, 1 << 31), (100, 0xFFFFFFFF)])
def test_credit_that_makes_no_sense_is_none(alloc: int, forwarded: int) -> None:
    with bench() as setup:
        host = setup.accept(PORT, HOST, buf_alloc=alloc, fwd_cnt=forwarded)
        host.sendall(b"x" * 1000)
        assert sum(len(p.data) for p in setup.settle()) <= alloc


def test_a_guest_without_credit_is_asked_for_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "_SWEEP_SECONDS", 0.001)
    with bench() as setup:
        host = setup.accept(PORT, HOST, buf_alloc=10)
        host.sendall(b"x" * 30)
        got = setup.settle()
        while len(got) < 2:
            setup.loop.turn(1.0)
            got += setup.settle()
        for _ in range(5):
            setup.loop.turn(1.0)
            got += setup.settle()
        assert [p.op for p in got] == [Op.RW, Op.CREDIT_REQUEST]


def test_a_guests_question_for_credit_is_answered(setup: Bench) -> None:
    setup.accept(PORT, HOST)
    setup.guest.send(Op.RW, PORT, HOST, b"12345")
    setup.guest.send(Op.CREDIT_REQUEST, PORT, HOST)
    (packet,) = setup.settle()
    assert (packet.op, packet.buf_alloc, packet.fwd_cnt) == (Op.CREDIT_UPDATE, WINDOW, 5)


def test_a_slow_reader_holds_the_guest_at_its_window() -> None:
    with bench() as setup:
        host = setup.accept(PORT, HOST)
        sent = 0
        told = 0
        while WINDOW - (sent - told) >= 4096:
            setup.guest.send(Op.RW, PORT, HOST, bytes(4096))
            sent += 4096
            told = max([told, *(p.fwd_cnt for p in setup.settle())])
        assert sent >= WINDOW
        assert setup.device.stats.resets == 0
        got = 0
        while got < sent:
            got += len(received(host) or b"")
            updates = setup.settle()
            told = max([told, *(p.fwd_cnt for p in updates)])
        assert sent - told < WINDOW // 2


def test_a_guest_that_sends_more_than_its_window_is_reset() -> None:
    with bench() as setup:
        host = setup.accept(PORT, HOST)
        got = []
        for _ in range(200):
            setup.guest.send(Op.RW, PORT, HOST, bytes(4096))
            got += setup.settle()
            if any(p.op == Op.RST for p in got):
                break
        assert got[-1].op == Op.RST
        assert setup.device.stats.resets == 1
        assert setup.device.stats.connections == 0
        host.close()


def test_without_receive_buffers_nothing_is_read_and_nothing_is_lost(setup: Bench) -> None:
    first, second = setup.accept(PORT, HOST), setup.accept(PORT + 1, HOST)
    data = {PORT: os.urandom(150_000), PORT + 1: os.urandom(150_000)}
    for host, content in ((first, data[PORT]), (second, data[PORT + 1])):
        with contextlib.suppress(BlockingIOError):
            assert host.send(content) == len(content)
    room = setup.guest.rx.size // len(setup.guest.buffers)
    got = setup.settle(fill=False)
    assert len(got) == room
    got += setup.settle()
    for port, content in data.items():
        assert b"".join(p.data for p in got if p.guest_port == port) == content
    # Fair: neither waits until the other is through.
    order = [p.guest_port for p in got]
    assert PORT in order[: len(order) // 2]
    assert PORT + 1 in order[: len(order) // 2]


# -- hostile guests -----------------------------------------------------------------------


@pytest.mark.parametrize("op", [0, 2, 4, 5, 6, 7, 8, 99])
def test_a_packet_of_no_connection_is_reset(op: int) -> None:
    with bench() as setup:
        setup.guest.send(op, PORT, HOST, b"x")
        (packet,) = setup.settle()
        assert packet[:3] == (Op.RST, HOST, PORT)


def test_a_reset_is_never_answered_by_a_reset() -> None:
    with bench() as setup:
        setup.guest.send(Op.RST, PORT, HOST)
        assert setup.settle() == []
        assert setup.device.stats.dropped == 1


@pytest.mark.parametrize("op", [0, 1, 2, 8, 99])
def test_an_operation_out_of_place_resets_the_connection(op: int) -> None:
    with bench() as setup:
        host = setup.accept(PORT, HOST)
        setup.guest.send(op, PORT, HOST)
        (packet,) = setup.settle()
        assert packet.op == Op.RST
        assert received(host) == b""
        assert setup.device.stats.resets == 1


def test_seqpacket_is_refused_in_its_own_type() -> None:
    with bench() as setup:
        setup.guest.send(Op.REQUEST, PORT, HOST, kind=2)
        (packet,) = setup.settle()
        assert (packet.op, packet.type) == (Op.RST, 2)
        assert setup.hosts == {}


@pytest.mark.parametrize(("source", "target"), [(4, 2), (CID, 3), (2, 2), (1 << 40, 2)])
def test_a_packet_from_or_to_somebody_else_is_dropped(source: int, target: int) -> None:
    with bench() as setup:
        setup.guest.send(Op.REQUEST, PORT, HOST, src_cid=source, dst_cid=target)
        assert setup.settle() == []
        assert setup.device.stats.dropped == 1


@pytest.mark.parametrize("length", [6, 65536, 0xFFFFFFFF])
def test_a_length_beyond_the_packet_resets_the_connection(length: int) -> None:
    with bench() as setup:
        setup.accept(PORT, HOST)
        setup.guest.send(Op.RW, PORT, HOST, b"short", length=length)
        assert [p.op for p in setup.settle()] == [Op.RST]


def test_data_after_the_end_reset_the_connection() -> None:
    with bench() as setup:
        setup.accept(PORT, HOST)
        setup.guest.send(Op.SHUTDOWN, PORT, HOST, flags=2)
        setup.guest.send(Op.RW, PORT, HOST, b"one more")
        assert [p.op for p in setup.settle()] == [Op.RST]


def test_a_packet_without_a_whole_header_is_dropped() -> None:
    with bench() as setup:
        setup.guest.tx.add(readable=[b"too short"])
        assert setup.settle() == []
        assert setup.device.stats.dropped == 1


def test_a_header_in_pieces_is_a_header() -> None:
    with bench() as setup:
        setup.guest.send(Op.REQUEST, PORT, HOST)
        (request,) = setup.guest.tx._requests.values()
        header = b"".join(setup.ram.read(*buffer) for buffer in request.buffers)
        setup.settle()
        setup.guest.send(Op.RST, PORT, HOST)
        setup.guest.tx.add(readable=[header[:10], header[10:40], header[40:]])
        assert [p.op for p in setup.settle()] == [Op.RESPONSE]


def test_a_flood_without_receive_buffers_is_held_and_goes_on_later() -> None:
    with bench() as setup:
        # The guest takes none of the answers it causes.
        setup.guest.take()
        sent = 0
        for _ in range(4 * MAX_RESETS):
            setup.guest.tx.collect()
            if not setup.guest.tx.free_descriptors:
                break
            setup.guest.send(Op.RW, PORT, HOST)
            sent += 1
            setup.kick()
            setup.loop.settle()
        assert setup.device.stats.packets_from_guest <= MAX_RESETS + setup.guest.rx.size
        assert sent < 4 * MAX_RESETS
        assert len(setup.settle()) == sent
        assert setup.accept(PORT, HOST)


def test_connections_that_come_and_go_without_receive_buffers_leave_nothing() -> None:
    with bench() as setup:
        setup.device.queue_stopped(vsock.RX)
        for number in range(2000):
            setup.guest.send(Op.REQUEST, number, HOST)
            setup.guest.send(Op.RST, number, HOST)
            setup.settle()
            setup.hosts[HOST].pop().close()
        waiting = setup.device._to_guest
        assert not waiting._owing
        assert not waiting._waiting
        assert not waiting._resets
        assert setup.device.stats.connections == 0


def test_more_connections_than_may_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "MAX_CONNECTIONS", 5)
    assert MAX_CONNECTIONS > 5
    with bench() as setup:
        for number in range(5):
            setup.accept(number, HOST)
        setup.guest.send(Op.REQUEST, PORT, HOST)
        assert [p.op for p in setup.settle()] == [Op.RST]
        host = setup.host_connects(1024)
        assert received(host) == b""
        assert setup.device.stats.refused == 2


def test_windows_get_small_before_they_add_up_to_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "ALL_WINDOWS", 2 * WINDOW)
    with bench() as setup:
        sizes = []
        for number in range(4):
            setup.guest.send(Op.REQUEST, number, HOST)
            sizes += [p.buf_alloc for p in setup.settle()]
        assert sizes == [WINDOW, WINDOW, SMALL_WINDOW, SMALL_WINDOW]


def test_the_rest_of_a_closed_stream_still_reaches_a_slow_reader() -> None:
    with bench() as setup:
        host = setup.accept(PORT, HOST)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        data = os.urandom(240 * 1024)
        for start in range(0, len(data), 4096):
            setup.guest.send(Op.RW, PORT, HOST, data[start : start + 4096])
            setup.settle()
        setup.guest.send(Op.SHUTDOWN, PORT, HOST, flags=3)
        setup.settle()
        setup.guest.send(Op.RST, PORT, HOST)  # it waits no longer
        setup.settle()
        got = b""
        while chunk := received(host):
            got += chunk
            setup.settle()
        assert got == data
        assert setup.device.stats.connections == 0


def test_a_reader_that_never_takes_the_rest_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "DRAIN_SECONDS", 0.0)
    monkeypatch.setattr(vsock, "_SWEEP_SECONDS", 0.0)
    with bench() as setup:
        setup.accept(PORT, HOST)
        for _ in range(60):
            setup.guest.send(Op.RW, PORT, HOST, bytes(4096))
            setup.settle()
        setup.guest.send(Op.SHUTDOWN, PORT, HOST, flags=3)
        setup.guest.send(Op.RST, PORT, HOST)
        setup.settle()
        assert setup.device.stats.connections == 0


def test_a_guest_that_keeps_a_closed_connection_loses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "CLOSE_SECONDS", 0.0)
    monkeypatch.setattr(vsock, "_SWEEP_SECONDS", 0.0)
    with bench() as setup:
        setup.accept(PORT, HOST).close()
        assert [p.op for p in setup.settle()] == [Op.SHUTDOWN, Op.RST]
        assert setup.device.stats.connections == 0


def test_a_reset_in_the_middle_ends_the_hosts_stream(setup: Bench) -> None:
    host = setup.accept(PORT, HOST)
    setup.guest.send(Op.RW, PORT, HOST, b"half")
    setup.guest.send(Op.RST, PORT, HOST)
    assert setup.settle() == []
    assert received(host) == b"half"
    assert received(host) == b""
    assert setup.device.stats.resets == 1


def test_a_reset_of_the_device_ends_every_connection_and_it_serves_the_next_driver() -> None:
    with bench() as setup:
        host = setup.accept(PORT, HOST)
        pending = setup.host_connects(1024)
        for number in (vsock.RX, vsock.TX):
            setup.device.queue_stopped(number)
        setup.device.reset()
        assert received(host) == b""
        assert received(pending) == b""
        for number, queue in ((vsock.RX, setup.guest.rx), (vsock.TX, setup.guest.tx)):
            queue.restart()
            setup.device.queue_started(number, queue.device_queue(setup.memory))
        setup.guest.fill()
        for number in (vsock.RX, vsock.TX):
            setup.device.queue_notified(number)
        host = setup.accept(PORT, HOST)
        host.sendall(b"again")
        assert [p.data for p in setup.settle()] == [b"again"]


def test_connections_survive_queues_that_stop_and_go_on(setup: Bench) -> None:
    host = setup.accept(PORT, HOST)
    queues = {vsock.RX: setup.guest.rx, vsock.TX: setup.guest.tx}
    for number in queues:
        setup.device.queue_stopped(number)
    host.sendall(b"while it was stopped")
    setup.guest.send(Op.RW, PORT, HOST, b"so was this")
    setup.loop.settle()
    for number, queue in queues.items():
        index = {vsock.RX: queue.used_seen, vsock.TX: queue.avail_index - 1}[number]
        setup.device.queue_started(number, queue.device_queue(setup.memory, index))
        setup.device.queue_notified(number)
    assert [p.data for p in setup.settle()] == [b"while it was stopped"]
    assert received(host) == b"so was this"


def test_buffers_that_a_read_did_not_fill_are_used_by_the_next(setup: Bench) -> None:
    host = setup.accept(PORT, HOST)
    for _ in range(5):
        data = os.urandom(5000)
        host.sendall(data)
        packets = setup.settle()
        assert b"".join(p.data for p in packets) == data
        setup.settle()
        assert setup.rx_queue.waiting == setup.guest.rx.size // len(setup.guest.buffers)


def test_the_guests_window_is_used_to_the_last_byte(setup: Bench) -> None:
    host = setup.accept(PORT, HOST, buf_alloc=GUEST_WINDOW)
    sent = 0
    got = 0
    data = bytes(range(256)) * 64
    with contextlib.suppress(BlockingIOError):
        while sent < 2 * GUEST_WINDOW:
            try:
                sent += host.send(data)
            except BlockingIOError:
                before = got
                got += sum(len(p.data) for p in setup.settle())
                if got == before:
                    break
    assert got == GUEST_WINDOW
