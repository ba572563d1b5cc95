"""The checks of `voidbus doctor`: each looks at one thing and changes nothing that was there."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from voidbus.cli.connect import open_link
from voidbus.cli.failure import Failure
from voidbus.cli.output import size
from voidbus.cli.state import find_supervisor, read_record
from voidbus.transport.access import socket_directory
from voidbus.vm.select import kvm_support, process_support, qemu_support

# pidfd_open(2) came with Linux 5.3; waiting for one with waitid(2) with 5.4.
_KERNEL = (5, 4)
_PYTHON = (3, 11)
# A run's journal is at most some tens of MiB; below the first nothing is sure to start, below the
# second a busy day may fill the disk.
_DISK_PROBLEM = 100 * 1024**2
_DISK_NOTE = 1024**3
# Each run costs the supervisor a handful of descriptors; 64 runs are the default limit.
_FILES = 1024


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at and what was found. `remedy` is what to do, where there is anything."""

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    remedy: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def examine(state: Path) -> list[Check]:
    """Every check, in the order of what stands on what. None of them raises."""
    return [
        _kernel(),
        _python(),
        _zmq(),
        _pidfd(),
        _open_files(),
        _guarded("state directory", lambda: _state_directory(state)),
        _guarded("sockets", lambda: _sockets(state)),
        _guarded("disk space", lambda: _disk(state)),
        _guarded("supervisor", lambda: _supervisor(state)),
        *_machines(),
    ]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (OSError, Failure) as error:
        return Check(name, "problem", str(error), "see the message; then run voidbus doctor again")


def _kernel() -> Check:
    release = platform.release()
    if platform.system() != "Linux":
        return Check("kernel", "problem", f"{platform.system()} {release}", "use Linux")
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < _KERNEL:
        return Check("kernel", "problem", f"Linux {release}", "use Linux 5.4 or later")
    return Check("kernel", "ok", f"Linux {release} {platform.machine()}")


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info < _PYTHON:
        return Check(
            "python", "problem", found, "use Python 3.11 or later: sudo apt-get install python3"
        )
    return Check("python", "ok", f"{found} ({sys.executable})")


def _zmq() -> Check:
    import zmq

    detail = f"libzmq {zmq.zmq_version()}, pyzmq {zmq.pyzmq_version()}"
    if not zmq.has("ipc"):
        return Check(
            "zeromq",
            "problem",
            f"{detail} has no ipc transport",
            f"{sys.executable} -m pip install --force-reinstall pyzmq",
        )
    if not zmq.has("curve"):
        return Check("zeromq", "note", f"{detail}, without CURVE: the bus can't use tcp")
    return Check("zeromq", "ok", detail)


def _pidfd() -> Check:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Check(
            "pidfd",
            "problem",
            f"pidfd_open: {error.strerror}",
            "use Linux 5.4 or later; in a container, allow pidfd_open in its seccomp profile",
        )
    return Check("pidfd", "ok", "processes are watched by descriptor")


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _FILES:
        return Check(
            "open files", "note", f"at most {soft} (hard limit {hard})", f"ulimit -n {_FILES}"
        )
    return Check("open files", "ok", f"at most {soft}")


def _nearest(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _state_directory(state: Path) -> Check:
    name = "state directory"
    nearest = _nearest(state)
    if not nearest.is_dir():
        return Check(
            name, "problem", f"{nearest} is not a directory", "choose another with --state-dir DIR"
        )
    owner = nearest.stat().st_uid
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        detail = f"{nearest} can't be written to: {error.strerror}"
        remedy = f"sudo chown {os.geteuid()} {nearest}" if nearest == state else ""
        return Check(name, "problem", detail, remedy or "choose another with --state-dir DIR")
    if nearest != state:
        return Check(name, "ok", f"{state} (will be made)")
    if owner != os.geteuid():
        return Check(
            name,
            "problem",
            f"{state} belongs to user {owner}",
            f"sudo chown -R {os.geteuid()} {state}, or run voidbus as that user",
        )
    if state.stat().st_mode & 0o022:
        return Check(name, "problem", f"others can write to {state}", f"chmod go-w {state}")
    return Check(name, "ok", str(state))


def _sockets(state: Path) -> Check:
    """Unix sockets' addresses hold 107 bytes (unix(7)); a long state directory needs another."""
    sockets = socket_directory(state)
    if sockets.is_symlink() or (sockets.exists() and not sockets.is_dir()):
        return Check("sockets", "problem", f"{sockets} is not a directory", f"rm {sockets}")
    if sockets.exists() and sockets.stat().st_uid != os.geteuid():
        return Check(
            "sockets",
            "problem",
            f"{sockets} belongs to user {sockets.stat().st_uid}",
            f"sudo rm -r {sockets}",
        )
    if sockets.parent != state:
        return Check(
            "sockets", "note", f"in {sockets}, for {state} is too long for a socket's address"
        )
    return Check("sockets", "ok", str(sockets))


def _disk(state: Path) -> Check:
    place = _nearest(state)
    free = shutil.disk_usage(place).free
    detail = f"{size(free)} free on {place}"
    remedy = f"free some: df -h {place}; or choose another place with --state-dir DIR"
    if free < _DISK_PROBLEM:
        return Check("disk space", "problem", detail, remedy)
    if free < _DISK_NOTE:
        return Check("disk space", "note", detail, remedy)
    return Check("disk space", "ok", detail)


def _supervisor(state: Path) -> Check:
    record = find_supervisor(state)
    if record is None:
        stale = read_record(state)
        ended = f"; the last one (process {stale.pid}) ended without a goodbye" if stale else ""
        return Check(
            "supervisor",
            "note",
            f"none runs on {state}{ended}",
            f"voidbus serve --state-dir {state} (voidbus run starts one for itself)",
        )
    try:
        open_link(record, state, "observe").leaf.close()
    except Failure as failure:
        return Check("supervisor", "problem", str(failure), f"kill {record.pid}; voidbus serve")
    return Check("supervisor", "ok", f"process {record.pid}, version {record.version}")


def _machines() -> list[Check]:
    """Each kind of machine; a host where only the one without isolation works has a problem."""
    checks = []
    for support in (qemu_support(), kvm_support(), process_support()):
        status: Literal["ok", "note", "problem"] = "ok" if support.works else "note"
        if support.machine == "qemu":
            status = "problem" if not support.works else "note" if support.remedy else "ok"
        elif support.machine == "process":
            status = "note"
        name = f"machine {support.machine}"
        checks.append(Check(name, status, support.detail, support.remedy or ""))
    return [*checks, _guest_image(), _agents(), _network()]


def _guest_image() -> Check:
    from voidbus.vm.image.store import ImageError, image_for

    try:
        image = image_for(None, None)
    except ImageError as error:
        return Check("guest image", "problem", str(error), "voidbus image build")
    return Check("guest image", "ok", f"{image.name} {image.digest[:12]}")


def _agents() -> Check:
    from voidbus.vm.image.agent_layers import AGENTS, agent_layers
    from voidbus.vm.image.store import ImageError, default_store

    try:
        found = agent_layers(default_store().root)
    except ImageError as error:
        return Check("agents", "note", str(error))
    there = ", ".join(f"{layer.name} {layer.version}" for layer in found)
    lacking = [name for name in sorted(AGENTS) if name not in {layer.name for layer in found}]
    if not lacking:
        return Check("agents", "ok", there)
    missing = f"no layer of {' and '.join(lacking)}: machines can't run what they lack"
    remedy = "; ".join(f"voidbus image build {name}" for name in lacking)
    return Check("agents", "note", f"{there}; {missing}" if there else missing, remedy)


def _network() -> Check:
    from voidbus.vm.network.user_network import available

    problem = available()
    if problem is None:
        return Check("guest network", "ok", "passt, behind a filter of frames")
    return Check("guest network", "note", f"`network: true` does not work: {problem}")
