"""Machines without a supervisor: one of each kind, and a QEMU that voidbus did not start."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kit.measure import Report

from voidbus.vm.channel import ExecCall, ExecResult, GuestChannel
from voidbus.vm.connect import Connected
from voidbus.vm.faults import ChannelFault
from voidbus.vm.guest.frames import FrameDecoder, MessageType, encode_frame
from voidbus.vm.guest.handshake import EVERYTHING, encode_ping
from voidbus.vm.image.store import ImageError, default_store
from voidbus.vm.image_machine import AGENT_PORT, ImageMachine
from voidbus.vm.kvm.support import kvm_support
from voidbus.vm.machine import Machine, MachineSpec
from voidbus.vm.qemu.command import command
from voidbus.vm.qemu.devices import Devices
from voidbus.vm.qemu.process import PROGRAM, find_program
from voidbus.vm.qemu.support import qemu_support

START_SECONDS = 90.0
CALL_SECONDS = 120.0

_POLL_SECONDS = 0.002


def why_no_machines() -> str | None:
    """What this host lacks for QEMU machines, or None."""
    support = qemu_support()
    if not support.works:
        return f"{support.detail}; {support.remedy}"
    try:
        default_store().current()
    except ImageError as error:
        return str(error)
    return None


def machines_work(report: Report) -> bool:
    """Whether they do; where not, the report says so and nothing is measured."""
    why = why_no_machines()
    if why is not None:
        report.leave_out("QEMU machines", why)
    return why is None


def kvm_machines_work(report: Report) -> bool:
    """The same of machines of KVM."""
    support = kvm_support()
    if not support.works:
        report.leave_out("machines of KVM", support.detail)
    return support.works


@contextlib.contextmanager
def new_spec(name: str) -> Iterator[MachineSpec]:
    """A machine's settings, in a scratch directory that is removed."""
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        yield MachineSpec("bench", name, Path(folder), secrets.token_bytes(32))


def make(kind: type[Machine], spec: MachineSpec) -> Machine:
    return kind(spec, on_exit=lambda _: None, on_lease=lambda _: None)


class TimedStart(ImageMachine):
    """Notes when steps of a start are done (time.monotonic). For machines of each kind."""

    shaken = configured = 0.0

    def _dial(self, timeout: float) -> Connected:
        connected = super()._dial(timeout)
        self.shaken = self.shaken or time.monotonic()
        return connected

    def _ready(self, channel: GuestChannel, deadline: float, *, first: bool) -> None:
        super()._ready(channel, deadline, first=first)
        self.configured = time.monotonic()


@contextlib.contextmanager
def started(kind: type[Machine]) -> Iterator[GuestChannel]:
    """The channel of a machine that is up."""
    with new_spec(kind.name) as spec:
        machine = make(kind, spec)
        try:
            yield machine.start(START_SECONDS)
        finally:
            machine.close()


def execute(channel: GuestChannel, *argv: str) -> int:
    """Run a program to its end; how many bytes it wrote. Raises ChannelFault, RuntimeError."""
    ended = threading.Event()
    results: list[ExecResult | ChannelFault] = []
    size = 0

    def output(_stream: str, data: bytes) -> None:
        nonlocal size
        size += len(data)

    def done(result: ExecResult | ChannelFault) -> None:
        results.append(result)
        ended.set()

    channel.exec(ExecCall(argv[0], argv[1:]), output, done)
    if not ended.wait(CALL_SECONDS):
        raise TimeoutError(f"{argv[0]} did not end in {CALL_SECONDS:g} s")
    (result,) = results
    if isinstance(result, ChannelFault):
        raise result
    if result.exit_code != 0:
        raise RuntimeError(f"{argv[0]}: {result.exit_code} {result.error} {result.stderr!r}")
    return size


class PlainQemu:
    """The QEMU a machine would have, executed directly: same program, kernel, initramfs and
    devices, no supervision. Its vsock is served as the product serves it: QEMU has none that
    works without the host's kernel module. A context manager."""

    def __init__(self, spec: MachineSpec, *, kernel_words: str = "") -> None:
        self._spec = spec
        self._open = contextlib.ExitStack()
        self._devices = Devices(spec, on_failed=lambda _: None, on_lease=lambda _: None)
        self._kernel_words = kernel_words

    def __enter__(self) -> PlainQemu:
        self._open.callback(self._devices.close)
        try:
            self._devices.start(time.monotonic() + START_SECONDS)
            self._argv, self._descriptors = self._command()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _command(self) -> tuple[list[str], tuple[int, ...]]:
        layout, console = self._devices.layout(find_program(PROGRAM) or PROGRAM, self._kernel_words)
        for end in console:
            self._open.callback(end.close)
        self.serial = console.serial
        return command(layout), layout.descriptors

    def spawn(self) -> float:
        """Execute it; when (time.monotonic) that began."""
        moment = time.monotonic()
        child = subprocess.Popen(
            self._argv,
            pass_fds=self._descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._open.callback(child.wait)
        self._open.callback(child.kill)
        self._devices.handed()
        return moment

    def wait_for_agent(self) -> float:
        """Ask for a Pong without pause or patience; when (time.monotonic) it came."""
        deadline = time.monotonic() + START_SECONDS
        ping = encode_frame(MessageType.PING, encode_ping(self._spec.secret, EVERYTHING))
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), self._devices.connect(AGENT_PORT) as sock:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.sendall(ping)
                if FrameDecoder(limit=256).feed(sock.recv(256)):
                    return time.monotonic()
            time.sleep(_POLL_SECONDS)
        raise TimeoutError(f"the guest of a plain QEMU did not answer in {START_SECONDS:g} s")

    def wait_for_lines(self, *texts: str) -> list[float]:
        """When (time.monotonic) each first stood on the console, in the order given."""
        deadline = time.monotonic() + START_SECONDS
        seen, moments = b"", list[float]()
        while len(moments) < len(texts):
            self.serial.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.serial.recv(65536)
            if not data:
                raise ConnectionError(f"QEMU ended; its console: {seen[-1000:]!r}")
            seen += data
            while len(moments) < len(texts) and texts[len(moments)].encode() in seen:
                moments.append(time.monotonic())
        return moments
