"""The VM actor: owns one machine and its guest channel.

A thin shell: messages become calls on the machine, its results become messages. Whatever blocks
runs on a job thread; output of programs comes on the channel's thread, which waits while the run
actor's mailbox is full, so that a flood slows its guest down and nobody else.
"""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from voidbus.actors.artifact_store import ArtifactStore
from voidbus.actors.console_file import keep_console
from voidbus.actors.host_services import HostServices
from voidbus.actors.leases import LeaseFile
from voidbus.actors.messages.actor import Done
from voidbus.actors.messages.file_content import media_type_of
from voidbus.actors.messages.machine import (
    ExecEnded,
    ExecOutput,
    Execute,
    GuestFile,
    GuestFileChanged,
    GuestFileMissing,
    GuestFileStored,
    MachineEnded,
    MachineReady,
    MachineStopped,
    ReadGuestFile,
    SignalExec,
    StartMachine,
    StopMachine,
    StoreGuestFile,
    WatchGuestFile,
    WriteGuestFile,
)
from voidbus.actors.messages.runs import ConsoleText, ReadConsole
from voidbus.actors.messages.telemetry import GuestSample, GuestSamples
from voidbus.actors.runtime.actor import LATER, Actor, Place, Refuse, Timer, handles
from voidbus.actors.runtime.heap import trim_heap
from voidbus.actors.runtime.process import ProcessIdentity
from voidbus.sidecar.model_endpoint import ModelEndpoint
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.message import Message
from voidbus.vm.channel import ExecCall, ExecHandle, ExecResult, GuestChannel
from voidbus.vm.faults import ChannelFault
from voidbus.vm.faults import FaultReason as ChannelFaultReason
from voidbus.vm.guest.file_messages import FileStat
from voidbus.vm.guest.telemetry_messages import TelemetryBatch
from voidbus.vm.machine import Lease, Machine, MachineExit, MachineSpec, StopStep

log = logging.getLogger("voidbus.actors")

# How long a file request may take in the guest, and how long output may wait for the run actor.
_FILE_TIMEOUT = 30.0
_WATCH_TIMEOUT = 10.0
# A file that is kept is handed on too where it is this small (bytes): structured output is read.
_LOOKED_AT = 4 * 1024 * 1024
_OUTPUT_TIMEOUT = 60.0
# A piece of output handed on at once: bytes, and lines. Guests send 4096 bytes; a hostile one may
# send 64 MiB, and the run actor's mailbox counts messages. Each line is an event, 60 us of the run
# actor's time, in which it takes no cancel: the 32,000 empty lines of 64 KiB would be 2 s.
_OUTPUT_PIECE = 64 * 1024
_OUTPUT_LINES = 256
# When the channel is lost or the machine ends, how long the other of the two is waited for, which
# tells the reason or brings the last output (seconds).
_END_SECONDS = 2.0
# A program killed by a signal that was not sent from here may be the first sign that its machine
# is going down; so long its end is held back, for the machine's to be told first (seconds).
_SIGNAL_SECONDS = 0.5
# Of the time this actor has to stop, what is kept for a machine that has to be killed (seconds).
_KILL_RESERVE = 3.0
# The longest limit of a program (seconds): poll(2) takes milliseconds of 31 bits. 0 is no limit.
_LONGEST_LIMIT = 2_000_000
# What is kept of the guest's own words in an error (characters).
_WORDS_LIMIT = 2000
# Guest samples are taken every second and handed in every five: a hundred idle runs then wake the
# supervisor twenty times a second rather than a hundred.
_SAMPLE_INTERVAL_MS = 1000
_SAMPLES_A_REPORT = 5
_SAMPLE_LEAST_SECONDS = 0.5


class VmActor(Actor):
    """One machine from start to stop. `owner` is the path of the run actor; the machine's console
    is kept in `directory` when it has ended. `reason` says why it is of this kind. `stage` is the
    one stage the machine is for, if it is for one only. Files are kept in `artifacts`. The guest
    reaches `model` by a gateway of this actor's."""

    mailbox_limit = 256
    control: ClassVar[frozenset[type[Message]]] = frozenset({StopMachine, SignalExec})

    def __init__(
        self,
        place: Place,
        machine: type[Machine],
        spec: MachineSpec,
        *,
        owner: str,
        telemetry: str,
        leases: LeaseFile,
        directory: Path,
        reason: str,
        artifacts: ArtifactStore,
        stage: str | None = None,
        model: ModelEndpoint | None = None,
    ) -> None:
        super().__init__(place)
        self._artifacts = artifacts
        self._stage = stage
        self._owner = owner
        self._telemetry = telemetry
        self._leases = leases
        self._directory = directory
        self._reason = reason
        self._spec = spec
        self._machine = machine(spec, on_exit=self._machine_exit, on_lease=self._lease)
        self._services = HostServices(self._machine, model, spec.scratch)
        self._channel: GuestChannel | None = None
        self._execs: dict[int, ExecHandle] = {}
        self._signalled: set[int] = set()
        self._samples: deque[tuple[int, GuestSample]] = deque()
        self._sampled_at = -1.0  # by the monotonic clock
        self._stopping = False
        self._end_reason: str | None = None
        self._lost: str | None = None
        self._end_timer: Timer | None = None
        self._end_told = False

    def on_stop(self) -> None:
        self._machine.kill()
        self._machine.close()
        self._services.close()
        try:
            keep_console(self._directory, self._machine.console(), self._stage)
        except OSError as error:
            log.error("%s: the console was not kept: %s", self.path, error)
        shutil.rmtree(self._spec.scratch, ignore_errors=True)

    def on_stop_request(self, timeout: float) -> None:
        grace = max(timeout / 2, timeout - _KILL_RESERVE)
        self._stop_machine(grace, lambda _: super(VmActor, self).on_stop_request(timeout))

    # -- start and stop --------------------------------------------------------------------

    @handles(StartMachine)
    def on_start_machine(self, message: StartMachine, delivery: Delivery) -> object:
        def start() -> tuple[GuestChannel, str | None, str | None]:
            channel = self._machine.start(message.timeout)
            channel.subscribe_telemetry(_SAMPLE_INTERVAL_MS, self._sampled)
            return (
                channel,
                self._services.offer_sidecar(channel, message.sidecar),
                self._services.offer_model(channel),
            )

        def started(outcome: tuple[GuestChannel, str | None, str | None] | Exception) -> None:
            if isinstance(outcome, Exception):
                delivery.fail(FaultReason.FAILED, str(outcome)[: 2 * _WORDS_LIMIT])
                return
            self._channel, sidecar_url, model_url = outcome
            delivery.reply(
                MachineReady(
                    machine=self._machine.name,
                    isolation=self._machine.isolation,
                    reason=self._reason,
                    warnings=self._machine.warnings,
                    sidecar_url=sidecar_url,
                    model_url=model_url,
                )
            )
            trim_heap()  # of what the start used: 0.6 of 13 MB
            if self._end_reason is not None:
                self._look_for_end()

        self.work(start, started, name="start")
        return LATER

    @handles(StopMachine)
    def on_stop_machine(self, message: StopMachine, delivery: Delivery) -> object:
        self._stop_machine(message.grace, lambda step: delivery.reply(MachineStopped(step=step)))
        return LATER

    def _stop_machine(self, grace: float, then: Callable[[str], None]) -> None:
        self._stopping = True
        self._hand_in_samples()  # a run may be over before there are as many as are waited for

        def stopped(outcome: StopStep | Exception) -> None:
            if isinstance(outcome, Exception):
                log.error("%s: stopping the machine: %s", self.path, outcome)
            then(str(outcome))

        self.work(lambda: self._machine.stop(grace), stopped, name="stop")

    def _machine_exit(self, exit_: MachineExit) -> None:
        """On a thread of the machine."""

        def ended() -> None:
            self._end_reason = exit_.reason
            self._look_for_end()

        self.post(ended)

    def _look_for_end(self) -> None:
        """Tell of the machine's end once its last output is here and the reason is known."""
        if self._stopping or self._end_told or self._channel is None:
            return  # before there is a channel, the answer to StartMachine says it
        if self._end_reason is not None and not self._execs:
            self._tell_end()
        elif self._end_timer is None:
            self._end_timer = self.after(_END_SECONDS, self._tell_end)

    def _tell_end(self) -> None:
        if self._stopping or self._end_told:
            return
        self._end_told = True
        reason = self._end_reason or f"its guest channel was lost: {self._lost}"
        console = self._machine.console()[-_WORDS_LIMIT:].decode(errors="replace")
        # Behind the output, and waiting for room: it must not be refused by a mailbox that is full.
        self._pass_on(MachineEnded(reason=reason, console=console))

    def _lease(self, lease: Lease) -> None:
        if lease.pid is not None and lease.start_time is not None:
            self._leases.process(ProcessIdentity(lease.pid, lease.start_time))
        elif lease.path is not None:
            self._leases.path(lease.path)

    @handles(ReadConsole)
    def on_read_console(self, message: ReadConsole, delivery: Delivery) -> ConsoleText:
        return ConsoleText(text=self._machine.console().decode(errors="replace"))

    # -- programs --------------------------------------------------------------------------

    @handles(Execute)
    def on_execute(self, message: Execute, delivery: Delivery) -> None:
        number = message.number

        def on_output(stream: str, data: bytes) -> None:
            for piece in _pieces(data):
                self._pass_on(ExecOutput(number=number, stream=stream, data=piece))

        def on_done(outcome: ExecResult | ChannelFault) -> None:
            # The run actor hears of it from this actor's thread, behind all output.
            self.post(lambda: self._exec_done(number, outcome))

        call = ExecCall(
            program=message.program,
            args=message.args,
            env=tuple(message.env.items()),
            stdin=message.stdin,
            working_dir=None,
            timeout=min(message.timeout, _LONGEST_LIMIT),
        )
        self._execs[number] = self._require_channel().exec(call, on_output, on_done)

    def _exec_done(self, number: int, outcome: ExecResult | ChannelFault) -> None:
        self._execs.pop(number, None)
        if isinstance(outcome, ChannelFault):
            if outcome.reason is ChannelFaultReason.LOST:
                # The machine's end, which is told once for all its programs.
                self._lost = self._lost or outcome.detail[:_WORDS_LIMIT]
                self._look_for_end()
                return
            error = str(outcome)[:_WORDS_LIMIT]
            self._pass_on(ExecEnded(number=number, exit_code=-1, error=error, duration_ms=0))
            return
        ended = ExecEnded(
            number=number,
            exit_code=outcome.exit_code,
            error=outcome.error and outcome.error[:_WORDS_LIMIT],
            duration_ms=outcome.duration_ms or 0,
        )
        if outcome.signal is not None and number not in self._signalled:
            self.after(_SIGNAL_SECONDS, lambda: self._pass_on(ended))
        else:
            self._pass_on(ended)

    @handles(SignalExec)
    def on_signal(self, message: SignalExec, delivery: Delivery) -> None:
        handle = self._execs.get(message.number)
        if handle is not None:
            self._signalled.add(message.number)
            handle.signal(signal.Signals(message.signal))

    def _pass_on(self, message: Message) -> None:
        """Hand the run actor a message, waiting for room: mostly on the channel's thread."""
        refused = self.system.tell_wait(
            self._owner, message, sender=self.path, timeout=_OUTPUT_TIMEOUT
        )
        if refused is not None and not self._stopping:
            log.error("%s: %s was lost: %s", self.path, message.tag, refused.value)

    # -- files -----------------------------------------------------------------------------

    @handles(WriteGuestFile)
    def on_write_file(self, message: WriteGuestFile, delivery: Delivery) -> object:
        channel = self._require_channel()
        self.work(
            lambda: channel.write_file(message.path, message.content, timeout=_FILE_TIMEOUT),
            lambda outcome: _answer(delivery, outcome, None),
            name="write",
        )
        return LATER

    @handles(ReadGuestFile)
    def on_read_file(self, message: ReadGuestFile, delivery: Delivery) -> object:
        channel = self._require_channel()

        def read(outcome: bytes | Exception) -> None:
            content = GuestFile(content=outcome) if isinstance(outcome, bytes) else None
            _answer(delivery, outcome, content)

        self.work(lambda: channel.read_file(message.path, timeout=_FILE_TIMEOUT), read, name="read")
        return LATER

    @handles(StoreGuestFile)
    def on_store_file(self, message: StoreGuestFile, delivery: Delivery) -> object:
        channel = self._require_channel()

        def store() -> GuestFileStored | GuestFileMissing:
            if not channel.file_stat(message.path, timeout=_FILE_TIMEOUT).exists:
                return GuestFileMissing()
            content = channel.read_file(message.path, timeout=_FILE_TIMEOUT)
            if len(content) > message.limit:
                raise Refuse(
                    f"{message.path}: {len(content)} bytes are more than the {message.limit} that "
                    "may still be kept of this run"
                )
            return GuestFileStored(
                digest=self._artifacts.put(content),
                size_bytes=len(content),
                media_type=media_type_of(content),
                content=content if len(content) <= _LOOKED_AT else None,
            )

        def stored(outcome: GuestFileStored | GuestFileMissing | Exception) -> None:
            _answer(delivery, outcome, None if isinstance(outcome, Exception) else outcome)

        self.work(store, stored, name="store")
        return LATER

    @handles(WatchGuestFile)
    def on_watch_file(self, message: WatchGuestFile, delivery: Delivery) -> object:
        channel = self._require_channel()
        changed = GuestFileChanged(path=message.path)

        def on_change(_: FileStat) -> None:
            """On the channel's thread, twenty times a second at most."""
            self.post(lambda: self._pass_on(changed))

        self.work(
            lambda: channel.watch_file(message.path, on_change, timeout=_WATCH_TIMEOUT),
            lambda outcome: _answer(delivery, outcome, None),
            name="watch",
        )
        return LATER

    def _require_channel(self) -> GuestChannel:
        if self._channel is None:
            raise Refuse("the machine is not up", FaultReason.FAILED)
        return self._channel

    # -- telemetry -------------------------------------------------------------------------

    def _sampled(self, batch: TelemetryBatch) -> None:
        """On the channel's thread; a guest that floods is held to one sample a half second."""
        now = time.monotonic()
        if batch.system is None or now - self._sampled_at < _SAMPLE_LEAST_SECONDS:
            return
        self._sampled_at = now
        sample = GuestSample.model_validate(batch.system, from_attributes=True)
        self._samples.append((time.time_ns() // 1_000_000, sample))
        if len(self._samples) >= _SAMPLES_A_REPORT:
            self.post(self._hand_in_samples)

    def _hand_in_samples(self) -> None:
        """On this actor's thread, while the channel's may bring more."""
        samples = tuple(self._samples.popleft() for _ in range(len(self._samples)))
        if samples:
            self.tell(
                self._telemetry,
                GuestSamples(run_id=self._spec.run_id, stage_name=self._stage, samples=samples),
            )


def _pieces(output: bytes) -> Iterator[bytes]:
    """Output in pieces that take the run actor a moment each."""
    start = 0
    while start < len(output):
        piece = output[start : start + _OUTPUT_PIECE]
        lines = piece.split(b"\n", _OUTPUT_LINES)
        if len(lines) > _OUTPUT_LINES and lines[_OUTPUT_LINES]:
            piece = piece[: -len(lines[_OUTPUT_LINES])]
        yield piece
        start += len(piece)


def _answer(delivery: Delivery, outcome: object, reply: Message | None) -> None:
    if isinstance(outcome, Exception):
        delivery.fail(FaultReason.FAILED, str(outcome)[:_WORDS_LIMIT])
    else:
        delivery.reply(reply or Done())
