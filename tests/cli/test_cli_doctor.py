"""`voidbus doctor`: every problem comes with its remedy."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import FakeSupervisor

from voidbus.cli.checks import Check, examine
from voidbus.vm.image import agent_layers
from voidbus.vm.image.agent_layers import AgentLayer
from voidbus.vm.support import Support

Voidbus = Callable[..., Any]


def found(state: Path, name: str) -> Check:
    return next(check for check in examine(state) if check.name == name)


@pytest.mark.needs("vm")
def test_a_sound_host_exits_with_0(voidbus: Voidbus) -> None:
    result = voidbus("doctor")
    assert result.code == 0, result.out


def test_a_look_at_the_host_changes_nothing(voidbus: Voidbus, state: Path) -> None:
    result = voidbus("doctor")
    assert f"{state} (will be made)" in result.out
    assert f"voidbus serve --state-dir {state}" in result.out
    assert not state.exists()


def test_json_has_every_check(voidbus: Voidbus) -> None:
    result = voidbus("doctor", "--json")
    document = json.loads(result.out)
    checks = document["checks"]
    assert [check["name"] for check in checks] == [
        *("kernel", "python", "zeromq", "pidfd", "open files", "state directory", "sockets"),
        *("disk space", "supervisor", "machine qemu", "machine kvm", "machine process"),
        *("guest image", "agents", "guest network"),
    ]
    assert set(document) == {"ok", "checks"}
    assert all(set(check) == {"name", "status", "detail", "remedy"} for check in checks)
    assert {check["status"] for check in checks} <= {"ok", "note", "problem"}
    sound = all(check["status"] != "problem" for check in checks)
    assert (document["ok"], result.code) == (sound, 0 if sound else 1)


def test_the_machine_without_isolation_is_never_more_than_a_note(state: Path) -> None:
    check = found(state, "machine process")
    assert check.status == "note"
    assert "without isolation" in check.detail


def test_a_host_without_qemu_is_told_how_to_get_it(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = Support("qemu", False, "there is no qemu-system-x86_64", "install it")
    monkeypatch.setattr("voidbus.cli.checks.qemu_support", lambda: lacking)
    check = found(state, "machine qemu")
    assert (check.status, check.detail, check.remedy) == (
        "problem",
        "there is no qemu-system-x86_64",
        "install it",
    )


def test_a_host_without_a_guest_image_is_told_how_to_build_one(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in ("VOID_BOX_KERNEL", "VOID_BOX_INITRAMFS"):
        monkeypatch.delenv(variable, raising=False)
    check = found(state, "guest image")
    assert (check.status, check.remedy) == ("problem", "voidbus image build")


def test_agents_without_a_layer_are_noted_with_the_command_that_makes_it(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check = found(state, "agents")
    assert check.status == "note"
    assert check.detail.startswith("no layer of claude and codex")
    assert check.remedy == "voidbus image build claude; voidbus image build codex"
    layer = AgentLayer("claude", "1.2", "@x/claude", tmp_path, 1, ())
    monkeypatch.setattr(agent_layers, "agent_layers", lambda _: [layer])
    check = found(state, "agents")
    assert check.detail.startswith("claude 1.2; no layer of codex")
    assert check.remedy == "voidbus image build codex"


def test_a_running_supervisor_is_asked(voidbus: Voidbus, supervisor: FakeSupervisor) -> None:
    assert f"process {os.getpid()}, version 0.1.0" in voidbus("doctor").out


def test_a_state_directory_that_is_a_file_is_a_problem(voidbus: Voidbus, state: Path) -> None:
    state.write_text("")
    result = voidbus("doctor")
    assert result.code == 1
    assert f"{state} is not a directory" in result.out
    assert "choose another with --state-dir" in result.out


def test_a_state_directory_others_can_write_to_is_a_problem(state: Path) -> None:
    state.mkdir()
    state.chmod(0o777)
    check = found(state, "state directory")
    assert (check.status, check.remedy) == ("problem", f"chmod go-w {state}")


def test_a_state_directory_too_long_for_sockets_is_noted_with_their_place(tmp_path: Path) -> None:
    check = found(tmp_path / ("long" * 30), "sockets")
    assert check.status == "note"
    assert "/tmp/voidbus-" in check.detail


def test_a_full_disk_is_a_problem(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check = found(state, "disk space")
    assert check.status == "problem"
    assert "1.0KiB free" in check.detail
    assert check.remedy


def test_what_a_check_cannot_look_at_is_a_problem_and_not_a_crash(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert found(state, "disk space").status == "problem"


def test_an_old_kernel_is_a_problem_with_a_remedy(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.3.18-generic")
    assert found(state, "kernel").status == "problem"
    monkeypatch.setattr(platform, "release", lambda: "6.1-rc1+")
    assert found(state, "kernel").status == "ok"
