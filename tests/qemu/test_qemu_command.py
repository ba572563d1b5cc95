from __future__ import annotations

from dataclasses import replace

import pytest

from voidbus.vm.qemu.command import (
    Card,
    Layout,
    VhostUser,
    command,
    config_text,
)

LAYOUT = Layout(
    name="run-1",
    program="/usr/bin/qemu-system-x86_64",
    acceleration="tcg",
    memory_mb=256,
    vcpus=2,
    kernel=3,
    initramfs=4,
    monitor=5,
    serial=6,
    config=7,
    vhost_user=(VhostUser(8, "vhost-user-vsock-device"),),
)


def after(arguments: list[str], option: str) -> list[str]:
    return [arguments[n + 1] for n, text in enumerate(arguments[:-1]) if text == option]


def test_a_machine_has_no_device_but_the_ones_named() -> None:
    arguments = command(LAYOUT)
    assert "-nodefaults" in arguments
    assert "-no-user-config" in arguments
    assert after(arguments, "-device") == ["vhost-user-vsock-device,chardev=vhost0"]
    assert after(arguments, "-netdev") == []
    assert after(arguments, "-blockdev") == []


def test_the_kernel_line_with_its_secret_is_not_among_the_arguments() -> None:
    assert after(command(LAYOUT), "-append") == []
    assert after(command(LAYOUT), "-readconfig") == ["/proc/self/fd/7"]
    assert config_text("quiet voidbox.secret=aa") == (
        '[machine]\n  append = "quiet voidbox.secret=aa"\n'
    )


def test_qemu_may_neither_spawn_nor_gain_privileges() -> None:
    (sandbox,) = after(command(LAYOUT), "-sandbox")
    assert {"on", "spawn=deny", "elevateprivileges=deny"} <= set(sandbox.split(","))


def test_an_accelerated_machine_has_the_processor_of_the_host() -> None:
    arguments = command(replace(LAYOUT, acceleration="kvm"))
    assert after(arguments, "-accel") == ["kvm"]
    assert after(arguments, "-cpu") == ["host"]


def test_disks_are_read_only() -> None:
    arguments = command(replace(LAYOUT, disks=(9, 10)))
    drives = after(arguments, "-blockdev")
    assert after(arguments, "-add-fd") == ["fd=9,set=0", "fd=10,set=1"]
    assert all("read-only=on" in drive.split(",") for drive in drives)
    assert [drive.rpartition("=")[2] for drive in drives] == ["/dev/fdset/0", "/dev/fdset/1"]


def test_a_card_speaks_over_an_open_connection() -> None:
    arguments = command(replace(LAYOUT, card=Card(11, "52:54:00:12:34:56", 32768)))
    (net,) = after(arguments, "-netdev")
    assert "addr.str=11" in net.split(",")
    assert "virtio-net-device,netdev=net,mac=52:54:00:12:34:56,host_mtu=32768" in arguments


def test_qemu_inherits_all_it_uses_and_opens_no_path_of_ours() -> None:
    card = Card(11, "52:54:00:12:34:56", 32768)
    layout = replace(LAYOUT, disks=(9, 10), card=card)
    assert sorted(layout.descriptors) == list(range(3, 12))
    paths = [text for text in command(layout)[1:] if text.startswith("/")]
    assert paths == ["/proc/self/fd/3", "/proc/self/fd/4", "/proc/self/fd/7"]


def test_a_kernel_line_that_qemu_would_cut_is_refused() -> None:
    longest = "a" * 1009
    assert config_text(longest).splitlines()[1] == f'  append = "{longest}"'
    with pytest.raises(ValueError, match="fewer mounts"):
        config_text(longest + "a")


def test_a_core_of_qemu_has_no_memory_of_the_guest() -> None:
    (machine,) = after(command(LAYOUT), "-machine")
    assert "dump-guest-core=off" in machine.split(",")
