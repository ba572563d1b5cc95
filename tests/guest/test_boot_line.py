from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.vm.guest.boot_line import (
    RESERVED,
    NetworkSettings,
    Share,
    parse_boot_line,
    split_parameters,
    with_more,
    without_secret,
)

SECRET = "0123456789abcdef" * 4
PROTOCOL_NETWORK = NetworkSettings("10.0.2.15", 24, "10.0.2.2", ("10.0.2.3",))
LINE = (
    f"console=ttyS0 quiet panic=-1 reboot=t voidbox.secret={SECRET} voidbox.clock=1700000000.5 "
    "voidbus.hostname=run-1 voidbus.net=10.0.2.15/24,10.0.2.2,10.0.2.3 voidbus.layers=vda,vdb "
    "voidbox.mount0=mount0:/workspace/in:ro voidbox.mount1=mount1:/workspace/out:rw "
    "voidbus.marks=3489656832"
)


def test_a_whole_line_is_understood() -> None:
    line = parse_boot_line(LINE)
    assert line.secret == bytes.fromhex(SECRET)
    assert line.clock == 1700000000.5
    assert line.hostname == "run-1"
    assert line.marks == 0xCFFF_F000
    assert line.network == NetworkSettings("10.0.2.15", 24, "10.0.2.2", ("10.0.2.3",))
    assert line.layers == ("/dev/vda", "/dev/vdb")
    assert line.shares == (
        Share("mount0", "/workspace/in", False),
        Share("mount1", "/workspace/out", True),
    )
    assert line.restart
    assert line.faults == ()


def test_an_empty_line_lacks_only_the_secret() -> None:
    line = parse_boot_line("")
    assert (line.secret, line.shares, line.network, line.restart) == (None, (), None, False)
    assert line.faults == ("voidbox.secret is not on the command line: no host can connect",)


def test_the_protocols_network_key_gives_the_protocols_addresses() -> None:
    line = parse_boot_line("voidbox.network=1")
    assert line.network == PROTOCOL_NETWORK


def test_the_protocols_network_card_gives_its_addresses_whatever_other_devices_there_are() -> None:
    others = "virtio_mmio.device=512@0xd0800000:11 virtio_mmio.device=512@0xd1000000:12"
    card = "virtio_mmio.device=512@0xd0000000:10"
    for text in (card, f"{card} {others}", f"{others} {card}", f"voidbox.network=0 {card}"):
        assert parse_boot_line(text).network == PROTOCOL_NETWORK
    named = parse_boot_line(f"{card} voidbus.net=10.1.0.9/16,10.1.0.1")
    assert named.network == NetworkSettings("10.1.0.9", 16, "10.1.0.1", ())


@pytest.mark.parametrize(
    "text",
    [
        "virtio_mmio.device=512@0xd0800000:11 virtio_mmio.device=512@0xd1800000:13",
        "virtio_mmio.device=512@0xd0000000:10:0",
        "virtio_mmio.device=512@0xD0000000:10",
        "xvirtio_mmio.device=512@0xd0000000:10",
        "-- virtio_mmio.device=512@0xd0000000:10",
        "voidbox.network=0",
    ],
)
def test_what_is_not_exactly_the_protocols_card_is_no_network(text: str) -> None:
    line = parse_boot_line(f"voidbox.secret={SECRET} {text}")
    assert (line.network, line.faults) == (None, ())


def test_a_mount_is_read_only_unless_it_says_otherwise() -> None:
    assert parse_boot_line("voidbox.mount0=mount0:/data").shares == (
        Share("mount0", "/data", False),
    )
    # A colon may be a part of the path.
    assert parse_boot_line("voidbox.mount0=mount0:/da:ta").shares == (
        Share("mount0", "/da:ta", False),
    )


def test_mounts_come_in_the_order_of_their_numbers() -> None:
    line = parse_boot_line("voidbox.mount10=b:/b voidbox.mount2=a:/a")
    assert [share.tag for share in line.shares] == ["a", "b"]


@pytest.mark.parametrize(
    "path", ["", "data", "/", "/a/../b", "/proc/x", "/dev", "/opt/voidbus", "/usr", "/run"]
)
def test_a_mount_stays_out_of_what_belongs_to_the_machine(path: str) -> None:
    line = parse_boot_line(f"voidbox.mount0=mount0:{path}:rw voidbox.secret={SECRET}")
    assert line.shares == ()
    assert len(line.faults) == 1
    assert line.faults[0].startswith("voidbox.mount0=")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("voidbox.clock", "soon"),
        ("voidbox.clock", "-5"),
        ("voidbox.clock", "99999999999999"),
        ("voidbox.clock", "nan"),
        ("voidbus.marks", "4294967296"),
        ("voidbus.marks", "3489656833"),
        ("voidbus.marks", "0xcffff000"),
        ("voidbus.marks", "-1"),
        ("voidbus.hostname", "a.b"),
        ("voidbus.hostname", "-a"),
        ("voidbus.hostname", "a" * 64),
        ("voidbus.net", "10.0.2.15,10.0.2.2"),
        ("voidbus.net", "10.0.2.15/33,10.0.2.2"),
        ("voidbus.net", "10.0.2.256/24,10.0.2.2"),
        ("voidbus.net", "10.0.2.015/24,10.0.2.2"),
        ("voidbus.net", "10.0.2.15/24"),
        ("voidbus.layers", "../vda"),
        ("voidbus.more", "/etc/passwd"),
        ("voidbox.oci_rootfs_dev", "/etc/passwd"),
        ("voidbox.oci_rootfs", "../x"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_and_left(key: str, value: str) -> None:
    line = parse_boot_line(f"voidbox.secret={SECRET} {key}={value}")
    assert len(line.faults) == 1
    assert key in line.faults[0]
    assert (line.clock, line.hostname, line.network, line.layers) == (None, None, None, ())
    assert (line.rootfs_device, line.rootfs_path) == (None, None)


@pytest.mark.parametrize("secret", ["", "abc", "g" * 64, SECRET + "0", "é" * 64])
def test_a_bad_secret_lets_nobody_in_and_is_not_repeated(secret: str) -> None:
    line = parse_boot_line(f"voidbox.secret={secret}")
    assert line.secret is None
    assert len(line.faults) == 1
    assert not secret or secret not in line.faults[0]


def test_quotes_hold_blanks_together_and_two_dashes_end_the_kernels_part() -> None:
    assert list(split_parameters('a="b c" "d=e f" g -- h=i')) == [
        ("a", "b c"),
        ("d", "e f"),
        ("g", ""),
    ]


def test_the_line_for_programs_has_everything_but_the_secret() -> None:
    shown = without_secret(LINE)
    assert SECRET not in shown
    assert shown == LINE.replace(f"voidbox.secret={SECRET} ", "") + "\n"


def test_further_keys_come_from_a_device_up_to_its_first_zero() -> None:
    text = f"voidbox.secret={SECRET} voidbus.more=vdb\n"
    assert parse_boot_line(text).more == "/dev/vdb"
    line = parse_boot_line(with_more(text, b"voidbox.mount0=mount0:/a:rw" + bytes(100) + b"x=y"))
    assert [share.guest_path for share in line.shares] == ["/a"]
    assert line.secret is not None
    assert line.faults == ()


@given(st.binary(max_size=300))
def test_no_device_with_further_keys_makes_the_parser_raise(data: bytes) -> None:
    parse_boot_line(with_more("a=b", data))


@given(st.text(max_size=300))
def test_no_line_makes_the_parser_raise(text: str) -> None:
    parse_boot_line(text)


PATHS = st.lists(
    st.sampled_from(["a", "..", ".", "", "proc", "usr", "lib", "dev", "x:y"]), max_size=5
)


@given(PATHS.map("/".join), st.sampled_from(["", ":ro", ":rw", ":x"]))
def test_every_mount_taken_is_a_plain_absolute_path(path: str, mode: str) -> None:
    for share in parse_boot_line(f"voidbox.mount0=t:/{path}{mode}").shares:
        names = share.guest_path.split("/")[1:]
        assert share.guest_path.startswith("/")
        assert all(name not in ("", ".", "..") for name in names)
        assert not any((share.guest_path + "/").startswith(taken + "/") for taken in RESERVED)


@given(
    st.text(
        alphabet=st.characters(codec="ascii", exclude_characters='" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f')
    )
)
def test_a_secret_of_any_form_is_never_shown(word: str) -> None:
    secret = f"S3CRET{word}"
    text = f"a=b voidbox.secret={secret} c=d"
    assert "S3CRET" not in without_secret(text)
    assert all("S3CRET" not in fault for fault in parse_boot_line(text).faults)
