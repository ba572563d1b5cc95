"""What of a guest's frames passes, what is answered, and what is dropped."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from network_kit import (
    ACK,
    FIN,
    GUEST_MAC,
    HOST_MAC,
    RST,
    SYN,
    Segment,
    arp,
    echo,
    ethernet,
    ipv4,
    tcp,
    udp,
)

from voidbus.vm.network.addresses import MTU
from voidbus.vm.network.connections import CLOSING, HALF_CLOSED_SECONDS, IDLE_SECONDS
from voidbus.vm.network.frame_filter import (
    DROP,
    ECHO_IDS,
    LEAST_WINDOW,
    LOCALITIES,
    UDP_PORTS,
    UDP_SECONDS,
    FrameFilter,
)
from voidbus.vm.network.packets import checksum, window_scale
from voidbus.vm.network.rules import NetworkRules

OUTSIDE = "198.51.100.2"
OWN = {bytes([198, 51, 100, 1])}
SIDECAR = 8080


def make_filter(**rules: int) -> FrameFilter:
    limits = {"connections": 64, "connections_per_second": 50, **rules}
    return FrameFilter(
        NetworkRules(host_ports=frozenset({SIDECAR}), **limits),  # type: ignore[arg-type]
        lambda address: address not in OWN,
    )


def verdict(frame_filter: FrameFilter, frame: bytes, now: float = 100.0) -> bytes | None:
    """The filter's verdict on the frame in the middle of a buffer."""
    buffer = bytearray(b"\xee" * 9 + frame + b"\xee" * 3)
    return frame_filter.judge(buffer, 9, 9 + len(frame), now)


def observe(frame_filter: FrameFilter, to_guest: bytes) -> None:
    frame_filter.observe(bytearray(to_guest), 0, len(to_guest))


def from_host(by: str, by_port: int, flags: int, *, port: int = 40000) -> bytes:
    """A segment from the other side of a connection."""
    header = struct.pack(">HHIIBBHHH", by_port, port, 1, 1, 5 << 4, flags, 0, 0, 0)
    return ethernet(ipv4(header, "10.0.2.15", 6, by=by), to=GUEST_MAC, by=HOST_MAC)


@pytest.mark.parametrize(
    ("address", "port"), [(OUTSIDE, 443), ("10.0.2.2", SIDECAR), ("192.168.1.9", 22)]
)
def test_a_connection_to_an_allowed_place_passes(address: str, port: int) -> None:
    assert verdict(make_filter(), tcp(address, port)) is None


@pytest.mark.parametrize(
    ("address", "port"),
    [
        ("10.0.2.2", SIDECAR + 1),
        ("10.0.2.3", 53),
        ("10.0.2.3", SIDECAR),
        ("10.0.2.1", SIDECAR),
        ("10.0.2.15", SIDECAR),
        ("10.0.2.255", SIDECAR),
        ("127.0.0.1", SIDECAR),
        ("127.255.255.254", SIDECAR),
        ("0.0.0.0", SIDECAR),
        ("0.1.2.3", SIDECAR),
        ("198.51.100.1", SIDECAR),
        ("169.254.169.254", 80),
        ("224.0.0.1", 80),
        ("240.0.0.1", 80),
        ("255.255.255.255", 80),
    ],
)
def test_a_connection_to_a_forbidden_place_is_reset_at_once(address: str, port: int) -> None:
    answer = verdict(make_filter(), tcp(address, port, number=77))
    assert answer
    assert Segment.parse(answer) == Segment(address, port, 40000, 0, 78, RST | ACK, b"")


def test_a_port_of_the_host_is_offered_from_when_it_is_allowed() -> None:
    frame_filter = make_filter()
    assert verdict(frame_filter, tcp("10.0.2.2", 9)) is not None
    frame_filter.allow_host_port(9)
    assert verdict(frame_filter, tcp("10.0.2.2", 9)) is None


def test_only_the_hosts_ports_are_offered_at_the_gateway_and_no_datagrams() -> None:
    assert verdict(make_filter(), udp("10.0.2.2", SIDECAR)) is not None


def test_names_are_asked_for_by_udp_only() -> None:
    assert verdict(make_filter(), udp("10.0.2.3", 53)) is None
    assert verdict(make_filter(), udp("10.0.2.3", 54)) is not None


def test_a_refused_datagram_is_answered_as_prohibited() -> None:
    frame = udp("169.254.169.254", 53, b"0123456789")
    answer = verdict(make_filter(), frame)
    assert answer
    assert checksum(answer[14:34]) == checksum(answer[34:]) == 0
    assert answer[23] == 1
    assert answer[34:36] == b"\x03\x0d"
    assert answer[42:] == frame[14:42]


@pytest.mark.parametrize("address", ["224.0.0.251", "255.255.255.255", "10.0.2.255"])
def test_a_datagram_to_many_is_dropped_without_an_answer(address: str) -> None:
    assert verdict(make_filter(), udp(address, 5353)) == DROP


def test_the_gateway_answers_echo_requests_and_others_are_asked() -> None:
    answer = verdict(make_filter(), echo("10.0.2.2"))
    assert answer
    assert checksum(answer[34:]) == 0
    assert answer[34] == 0
    assert answer[38:] == echo("10.0.2.2")[38:]
    assert verdict(make_filter(), echo(OUTSIDE)) is None
    assert verdict(make_filter(), echo("127.0.0.1")) is not None


def test_arp_tells_the_gateway_and_the_name_server_and_nobody_else() -> None:
    for address in ("10.0.2.2", "10.0.2.3"):
        answer = verdict(make_filter(), arp(address))
        assert answer
        assert answer[:14] == GUEST_MAC + HOST_MAC + b"\x08\x06"
        assert answer[20:32] == b"\x00\x02" + HOST_MAC + bytes(map(int, address.split(".")))
    assert verdict(make_filter(), arp("10.0.2.15")) == DROP
    assert verdict(make_filter(), arp("10.0.2.9")) == DROP


GOOD = tcp(OUTSIDE, 443)
PACKET = GOOD[14:]


@pytest.mark.parametrize(
    "frame",
    [
        ethernet(PACKET, by=b"\x02" * 6),
        ethernet(PACKET, to=b"\xff" * 6),
        ethernet(PACKET, to=b"\x01\x00\x5e\x00\x00\x01"),
        ethernet(b"\x00\x01\x08\x00" + PACKET, kind=0x8100),
        ethernet(PACKET, kind=0x86DD),
        ethernet(PACKET, kind=0x88A8),
        tcp(OUTSIDE, 443, by="10.0.2.16"),
        tcp(OUTSIDE, 443, by="127.0.0.1"),
        ethernet(ipv4(PACKET[20:], OUTSIDE, 6, options=b"\x83\x04\x04\x00")),
        ethernet(ipv4(PACKET[20:], OUTSIDE, 6, fragment=0x2000)),
        ethernet(ipv4(PACKET[20:], OUTSIDE, 6, fragment=1)),
        ethernet(ipv4(PACKET[20:], OUTSIDE, 6, fragment=0x8000)),
        ethernet(ipv4(PACKET[20:], OUTSIDE, 6, total=41)),
        ethernet(ipv4(PACKET[20:], OUTSIDE, 6, total=39)),
        ethernet(ipv4(PACKET[20:] + bytes(7), OUTSIDE, 6, total=40)),
        ethernet(ipv4(PACKET[20:], OUTSIDE, 2)),
        ethernet(ipv4(PACKET[20:], OUTSIDE, 41)),
        ethernet(ipv4(PACKET[20:32] + b"\x40" + PACKET[33:], OUTSIDE, 6)),
        ethernet(ipv4(PACKET[20:32] + b"\x60" + PACKET[33:], OUTSIDE, 6)),
        ethernet(ipv4(b"\x08\0" + bytes(5), OUTSIDE, 1)),
        ethernet(ipv4(b"\x0d\0" + bytes(18), OUTSIDE, 1)),
        ethernet(ipv4(struct.pack(">HHHH", 1, 2, 9, 0), OUTSIDE, 17)),
        ethernet(ipv4(struct.pack(">HHHH", 1, 2, 7, 0), OUTSIDE, 17)),
        tcp(OUTSIDE, 443, SYN | FIN),
        tcp(OUTSIDE, 443, SYN | RST),
        tcp(OUTSIDE, 443, SYN | ACK),
        tcp(OUTSIDE, 443, RST),
        udp(OUTSIDE, 9, bytes(MTU)),
        GOOD[:-1],
        GOOD[:34],
        GOOD[:14],
        b"",
    ],
)
def test_what_is_not_a_plain_packet_of_the_guest_is_dropped(frame: bytes) -> None:
    assert verdict(make_filter(), frame) == DROP


def test_a_short_frame_may_be_padded() -> None:
    assert verdict(make_filter(), GOOD + bytes(6)) is None
    assert verdict(make_filter(), GOOD + bytes(7)) == DROP


@given(st.binary(max_size=120))
def test_bytes_that_are_no_frame_never_pass(data: bytes) -> None:
    assert verdict(make_filter(), data) is not None


@given(
    st.sampled_from([GOOD, udp(OUTSIDE, 9, b"12345"), echo(OUTSIDE), arp()]),
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 255)), max_size=4),
    st.integers(0, 80),
)
def test_whatever_passes_is_a_packet_to_where_the_guest_may_go(
    frame: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    changed = bytearray(frame[:length])
    for place, value in changes:
        if place < len(changed):
            changed[place] = value
    if verdict(make_filter(), bytes(changed)) is not None:
        return
    assert changed[:15] == HOST_MAC + GUEST_MAC + b"\x08\x00\x45"
    total = int.from_bytes(changed[16:18])
    assert 28 <= total <= len(changed) - 14
    assert changed[20] & 0xBF == changed[21] == 0
    assert changed[23] in (1, 6, 17)
    assert changed[26:30] == bytes([10, 0, 2, 15])
    to = bytes(changed[30:34])
    assert to not in OWN
    assert to[0] not in (0, 127)
    assert to[0] < 224
    assert to[:2] != bytes([169, 254])
    if to[:3] == bytes([10, 0, 2]):
        assert (to[3], changed[23], int.from_bytes(changed[36:38])) in (
            (2, 6, SIDECAR),
            (3, 17, 53),
        )


# -- connections ----------------------------------------------------------------------------


def opened(frame_filter: FrameFilter, count: int, *, now: float = 100.0, first: int = 1) -> int:
    """How many of so many new connections pass."""
    frames = (tcp(OUTSIDE, 443, by_port=first + number) for number in range(count))
    return sum(verdict(frame_filter, frame, now) is None for frame in frames)


def test_a_connection_over_the_limit_is_reset() -> None:
    frame_filter = make_filter(connections=3)
    assert opened(frame_filter, 3) == 3
    answer = verdict(frame_filter, tcp(OUTSIDE, 443, by_port=99))
    assert answer
    assert Segment.parse(answer).flags == RST | ACK


def test_a_connection_too_soon_is_dropped_so_that_the_guest_asks_again() -> None:
    frame_filter = make_filter(connections_per_second=5)
    assert opened(frame_filter, 9) == 5
    assert verdict(frame_filter, tcp(OUTSIDE, 443, by_port=99)) == DROP
    assert verdict(frame_filter, tcp(OUTSIDE, 443, by_port=99), 100.2) is None


def test_asking_again_for_the_same_connection_counts_once() -> None:
    frame_filter = make_filter(connections=1)
    assert opened(frame_filter, 1) == opened(frame_filter, 1) == 1


def test_a_segment_of_no_connection_is_reset_and_never_passes() -> None:
    answer = verdict(make_filter(), tcp(OUTSIDE, 443, ACK, acknowledged=55, data=b"late"))
    assert answer
    assert Segment.parse(answer) == Segment(OUTSIDE, 443, 40000, 55, 0, RST, b"")
    answer = verdict(make_filter(), tcp(OUTSIDE, 443, FIN, number=5, data=b"abc"))
    assert answer
    assert Segment.parse(answer) == Segment(OUTSIDE, 443, 40000, 0, 9, RST | ACK, b"")


@pytest.mark.parametrize("by_guest", [True, False])
def test_a_reset_makes_room(by_guest: bool) -> None:
    frame_filter = make_filter(connections=1)
    assert opened(frame_filter, 1) == 1
    if by_guest:
        assert verdict(frame_filter, tcp(OUTSIDE, 443, RST, by_port=1)) is None
    else:
        observe(frame_filter, from_host(OUTSIDE, 443, RST, port=1))
    assert opened(frame_filter, 1, first=2) == 1


def test_a_connection_both_sides_closed_makes_room_and_its_last_word_passes() -> None:
    frame_filter = make_filter(connections=1)
    assert opened(frame_filter, 1) == 1
    assert verdict(frame_filter, tcp(OUTSIDE, 443, FIN | ACK, by_port=1)) is None
    assert opened(frame_filter, 1, first=2) == 0
    observe(frame_filter, from_host(OUTSIDE, 443, FIN | ACK, port=1))
    assert verdict(frame_filter, tcp(OUTSIDE, 443, ACK, by_port=1)) is None
    assert opened(frame_filter, 1, first=2) == 1


@pytest.mark.parametrize(
    ("flags", "seconds"), [(ACK, IDLE_SECONDS), (FIN | ACK, HALF_CLOSED_SECONDS)]
)
def test_a_forgotten_connection_makes_room_and_passt_is_told(flags: int, seconds: float) -> None:
    frame_filter = make_filter(connections=1)
    assert opened(frame_filter, 1, now=0.0) == 1
    assert verdict(frame_filter, tcp(OUTSIDE, 443, flags, by_port=1), 10.0) is None
    assert opened(frame_filter, 1, first=2, now=9.9 + seconds) == 0
    assert opened(frame_filter, 1, first=2, now=10.0 + seconds) == 1
    (told,) = frame_filter.outward
    assert told[:34] == ethernet(ipv4(bytes(20), OUTSIDE, 6))[:18] + b"\0\0\x40" + told[21:34]
    assert told[34:38] == struct.pack(">HH", 1, 443)
    assert told[47] == RST


@pytest.mark.parametrize(
    ("connections", "window"), [(1, 1 << 20), (4, 1 << 18), (64, LEAST_WINDOW)]
)
def test_windows_are_cut_down_to_a_share(connections: int, window: int) -> None:
    frame_filter = make_filter(connections_per_second=64)
    syn = tcp(OUTSIDE, 443, by_port=9, options=b"\x02\x04\x05\xb4\x01\x03\x03\x07")
    assert verdict(frame_filter, syn) is None
    assert opened(frame_filter, connections - 1, first=100) == connections - 1
    for flags in (ACK, FIN | ACK):
        buffer = bytearray(tcp(OUTSIDE, 443, flags, by_port=9))
        assert frame_filter.judge(buffer, 0, len(buffer), 100) is None
        assert int.from_bytes(buffer[48:50]) << 7 == window
    unscaled = bytearray(tcp(OUTSIDE, 443, ACK, by_port=100))
    if connections > 1:
        assert frame_filter.judge(unscaled, 0, len(unscaled), 100) is None
        assert unscaled[48:50] == b"\xff\xff"


@given(
    st.binary(max_size=10).map(lambda options: options.ljust((len(options) + 3) // 4 * 4, b"\0"))
)
def test_whatever_the_options_a_scale_is_found_or_none(options: bytes) -> None:
    assert 0 <= window_scale(tcp(OUTSIDE, 443, options=options, data=b"\x03\x03\x09")) <= 14


def test_the_scale_is_that_of_the_options_and_14_at_most() -> None:
    for scale, found in ((0, 0), (7, 7), (14, 14), (255, 14)):
        syn = tcp(OUTSIDE, 443, options=b"\x01\x03\x03" + bytes([scale]))
        assert window_scale(syn) == found


def test_datagram_senders_and_echoes_are_bounded_and_forgotten() -> None:
    frame_filter = make_filter()
    for port in range(UDP_PORTS):
        assert verdict(frame_filter, udp(OUTSIDE, 9, by_port=port)) is None
    assert verdict(frame_filter, udp(OUTSIDE, 9, by_port=UDP_PORTS)) == DROP
    assert verdict(frame_filter, udp(OUTSIDE, 9, by_port=5)) is None
    assert verdict(frame_filter, udp(OUTSIDE, 9, by_port=UDP_PORTS), 100 + UDP_SECONDS) is None
    for number in range(ECHO_IDS):
        assert verdict(frame_filter, echo(OUTSIDE, number)) is None
    assert verdict(frame_filter, echo(OUTSIDE, ECHO_IDS)) == DROP


@given(
    st.lists(
        st.tuples(
            st.sampled_from([SYN, ACK, FIN | ACK, RST, -FIN, -RST]),
            st.integers(1, 9),
            st.floats(0, 90),
        ),
        max_size=60,
    )
)
def test_never_more_connections_than_allowed(steps: list[tuple[int, int, float]]) -> None:
    """Counted as passt would: open from a SYN that passed to a reset that passed, or two ends."""
    frame_filter = make_filter(connections=3)
    known: dict[int, int] = {}  # port of the guest -> which sides have ended
    now = 0.0
    for flags, port, pause in steps:
        now += pause
        if flags < 0:
            observe(frame_filter, from_host(OUTSIDE, 443, -flags, port=port))
            passed = port in known
        else:
            passed = verdict(frame_filter, tcp(OUTSIDE, 443, flags, by_port=port), now) is None
        for frame in frame_filter.outward:
            known.pop(int.from_bytes(frame[34:36]), None)
        frame_filter.outward.clear()
        if passed and flags == SYN:
            known.setdefault(port, 0)
        elif passed and abs(flags) & RST:
            known.pop(port, None)
        elif passed and abs(flags) & FIN and port in known:
            known[port] |= 1 if flags > 0 else 2
            if known[port] == 3:
                del known[port]
        assert len(known) <= 3


def test_a_flood_of_anything_leaves_bounded_state() -> None:
    asked: list[bytes] = []

    def leads_out(address: bytes) -> bool:
        asked.append(address)
        return True

    frame_filter = FrameFilter(NetworkRules(), leads_out)
    for number in range(LOCALITIES * 2):
        address = f"198.{18 + number // 65536}.{number // 256 % 256}.{number % 256}"
        verdict(frame_filter, tcp(address, 443, by_port=number), 100 + number)
        verdict(frame_filter, tcp(address, 443, FIN | ACK, by_port=number), 100 + number)
        observe(frame_filter, from_host(address, 443, FIN | ACK, port=number))
    assert len(frame_filter._localities) <= LOCALITIES
    assert len(frame_filter._connections._closing) <= CLOSING
    assert len(frame_filter._connections) == 0


def test_an_address_whose_place_the_kernel_does_not_tell_is_refused() -> None:
    def silent(_: bytes) -> bool:
        raise OSError("no buffer space")

    assert verdict(FrameFilter(NetworkRules(), silent), tcp(OUTSIDE, 443)) is not None
