"""The machines of one run: as many at once as it may have, each behind a VM actor of its own."""

from __future__ import annotations

import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from voidbus.actors.messages.actor import Done, detail_of
from voidbus.actors.messages.machine import (
    ExecEnded,
    ExecOutput,
    Execute,
    GuestFileMissing,
    GuestFileStored,
    MachineReady,
    SignalExec,
    StartMachine,
    StoreGuestFile,
    WatchGuestFile,
    WriteGuestFile,
)
from voidbus.actors.runtime.policy import SupervisorStoppingError
from voidbus.actors.runtime.supervisor import ChildSpec, Supervisor
from voidbus.actors.workloads.conductor import Command, Exit, KeptFile, MachineRequest
from voidbus.transport.fault import Fault
from voidbus.transport.message import Message
from voidbus.vm.connect import connect_deadline

VM_PATH = "vm"
FIRST_SERVER_PORT = 8222
"""Where the MCP servers of a guest listen, one after the other (protocol, "Skills")."""

# Protocol, "Handshake": what a start may take beyond the deadline for the guest's answer (seconds).
_ESTABLISH_SECONDS = 30.0
_FILE_ASK_TIMEOUT = 40.0
_EXEC_ASK_TIMEOUT = 30.0
_SIGNAL_ASK_TIMEOUT = 10.0

MakeVm = Callable[[str, MachineRequest], ChildSpec]
"""(path, request) -> the VM actor's child."""


@dataclass
class _Exec:
    stage: str
    machine: FleetMachine
    on_output: Callable[[str, bytes], None]
    on_exit: Callable[[Exit], None]
    background: bool = False


@dataclass
class _Wanted:
    request: MachineRequest
    on_ready: Callable[[FleetMachine], None]
    on_lost: Callable[[str], None]


@dataclass(eq=False)
class FleetMachine:
    """One machine; what a workload knows as GuestMachine."""

    path: str
    fleet: Fleet
    wanted: _Wanted
    up: bool = False
    closed: bool = False
    isolated: bool = True
    sidecar_url: str | None = None
    model_url: str | None = None
    watches: dict[str, Callable[[], None]] = field(default_factory=dict)
    ports: set[int] = field(default_factory=set)

    def execute(
        self,
        stage: str,
        command: Command,
        on_output: Callable[[str, bytes], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        exec_ = _Exec(stage, self, on_output, on_exit, command.background)
        self.fleet.execute(exec_, command)

    def server_port(self, index: int) -> int:
        """As the protocol numbers them; a machine that has the host's network gets a free one."""
        if self.isolated:
            return FIRST_SERVER_PORT + index
        while True:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = int(free.getsockname()[1])
            if port not in self.ports:
                self.ports.add(port)
                return port

    def write_file(self, path: str, content: bytes, then: Callable[[str | None], None]) -> None:
        def written(outcome: Message) -> None:
            then(None if isinstance(outcome, Done) else detail_of(outcome))

        self._ask(WriteGuestFile(path=path, content=content), written, _FILE_ASK_TIMEOUT)

    def keep_file(
        self, path: str, limit: int, then: Callable[[KeptFile | str | None], None]
    ) -> None:
        def stored(outcome: Message) -> None:
            if isinstance(outcome, GuestFileStored):
                file = KeptFile(
                    outcome.digest, outcome.size_bytes, outcome.media_type, outcome.content
                )
                then(file)
            else:
                then(None if isinstance(outcome, GuestFileMissing) else detail_of(outcome))

        self._ask(StoreGuestFile(path=path, limit=max(0, limit)), stored, _FILE_ASK_TIMEOUT)

    def watch_file(
        self, path: str, on_change: Callable[[], None], on_failed: Callable[[str], None]
    ) -> None:
        self.watches[path] = on_change

        def watched(outcome: Message) -> None:
            if not isinstance(outcome, Done):
                on_failed(detail_of(outcome))

        self._ask(WatchGuestFile(path=path), watched, _FILE_ASK_TIMEOUT)

    def close(self) -> None:
        self.fleet.close(self)

    def _ask(self, message: Message, then: Callable[[Message], None], timeout: float) -> None:
        self.fleet.ask(self, message, then, timeout)


class Fleet:
    """Used by the run actor, in its thread. `on_changed` is called when the number of machines
    that are up has changed, `on_ready` with what a new one says of itself, `on_exec_end` with the
    stage whose program has ended, before the workload hears of it.
    """

    def __init__(
        self,
        run: Supervisor,
        make_vm: MakeVm,
        *,
        at_once: int,
        on_ready: Callable[[MachineRequest, MachineReady], None],
        on_changed: Callable[[], None],
        on_exec_end: Callable[[str], None],
    ) -> None:
        self._run = run
        self._make_vm = make_vm
        self._at_once = at_once
        self._on_ready = on_ready
        self._on_changed = on_changed
        self._on_exec_end = on_exec_end
        self.sidecar: tuple[str, int] | None = None
        self._wanted: deque[_Wanted] = deque()
        self._machines: dict[str, FleetMachine] = {}  # by path; those that are not gone yet
        self._execs: dict[int, _Exec] = {}
        self._exec_numbers = 0
        self._made = 0
        self.working = True  # else the workload is told of nothing any more

    @property
    def up(self) -> int:
        """Machines that answer, or did and are not gone yet."""
        return sum(machine.up for machine in self._machines.values())

    @property
    def newest(self) -> str | None:
        """The path of the machine that was started last, of those that are there."""
        return next(reversed(self._machines), None)

    @property
    def stages_running(self) -> set[str]:
        """The stages whose programs run; those in the background are of none."""
        return {each.stage for each in self._execs.values() if not each.background}

    # -- machines --------------------------------------------------------------------------

    def open(
        self,
        request: MachineRequest,
        on_ready: Callable[[FleetMachine], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Start a machine once there is room for it."""
        self._wanted.append(_Wanted(request, on_ready, on_lost))
        self._run.after(0.0, self._start_some)

    def _start_some(self) -> None:
        while self.working and self._wanted and len(self._machines) < self._at_once:
            self._start(self._wanted.popleft())

    def _start(self, wanted: _Wanted) -> None:
        self._made += 1
        path = VM_PATH if self._made == 1 else f"{VM_PATH}-{self._made}"
        machine = self._machines[path] = FleetMachine(path, self, wanted)
        try:
            self._run.add_child(self._make_vm(path, wanted.request))
        except SupervisorStoppingError:
            del self._machines[path]  # the run is ending
            return
        except (OSError, ValueError) as error:  # its directory could not be made
            del self._machines[path]
            self._lost(machine, f"the machine did not start: {error}")
            return
        timeout = connect_deadline() + _ESTABLISH_SECONDS
        sidecar = self.sidecar if wanted.request.messaging else None
        self.ask(
            machine,
            StartMachine(sidecar=sidecar, timeout=timeout),
            lambda outcome: self._started(machine, outcome),
            timeout + 5.0,
        )

    def _started(self, machine: FleetMachine, outcome: Message) -> None:
        if not isinstance(outcome, MachineReady):
            self._lost(machine, f"the machine did not start: {detail_of(outcome)}")
            self._remove(machine)
            return
        machine.up = True
        machine.isolated = outcome.isolation != "none"
        machine.sidecar_url = outcome.sidecar_url
        machine.model_url = outcome.model_url
        self._on_ready(machine.wanted.request, outcome)
        self._on_changed()
        machine.wanted.on_ready(machine)

    def close(self, machine: FleetMachine) -> None:
        """Stop a machine that is no longer wanted."""
        machine.closed = True
        self._forget_execs(machine)
        self._remove(machine)

    def machine_ended(self, path: str, reason: str) -> None:
        """A machine has ended by itself."""
        machine = self._machines.get(path)
        if machine is not None:
            self._lost(machine, reason)
            self._remove(machine)

    def child_ended(self, path: str, fault: str | None) -> None:
        """A VM actor is gone, and its machine with it; `fault` where it failed."""
        machine = self._machines.pop(path, None)
        if machine is None:
            return
        if fault is not None:
            self._lost(machine, f"the VM actor failed: {fault}")
        self._on_changed()
        self._start_some()

    def _lost(self, machine: FleetMachine, reason: str) -> None:
        self._forget_execs(machine)
        if not machine.closed and self.working:
            machine.closed = True
            machine.wanted.on_lost(reason)

    def _remove(self, machine: FleetMachine) -> None:
        if machine.path in self._machines and self._run.running_child(machine.path) is not None:
            self._run.remove_child(machine.path)

    def _forget_execs(self, machine: FleetMachine) -> None:
        self._execs = {n: each for n, each in self._execs.items() if each.machine is not machine}

    # -- programs --------------------------------------------------------------------------

    def execute(self, exec_: _Exec, command: Command) -> None:
        """Run a program."""
        self._exec_numbers += 1
        number = self._exec_numbers
        self._execs[number] = exec_
        message = Execute(
            number=number,
            program=command.program,
            args=command.args,
            env=dict(command.env),
            stdin=command.stdin,
            timeout=command.timeout,
        )

        def accepted(outcome: Message) -> None:
            if isinstance(outcome, Fault):
                self._exec_ended(number, Exit(-1, outcome.detail))

        # Told of even while the run is cancelled, which waits for its programs.
        self._run.ask(self._address(exec_.machine), message, accepted, timeout=_EXEC_ASK_TIMEOUT)

    def output(self, message: ExecOutput) -> None:
        """A program wrote something."""
        found = self._execs.get(message.number)
        if found is not None:
            found.on_output(message.stream, message.data)

    def ended(self, message: ExecEnded) -> None:
        """A program has ended."""
        end = Exit(message.exit_code, message.error, message.duration_ms)
        self._exec_ended(message.number, end)

    def _exec_ended(self, number: int, end: Exit) -> None:
        found = self._execs.pop(number, None)
        if found is None:
            return
        if not found.background:
            self._on_exec_end(found.stage)
        if self.working:
            found.on_exit(end)

    def file_changed(self, path: str, file: str) -> None:
        """A watched file is complete."""
        machine = self._machines.get(path)
        changed = machine.watches.get(file) if machine is not None else None
        if changed is not None and self.working:
            changed()

    def terminate(self) -> bool:
        """Send SIGTERM to every program but those in the background; whether there was any. The
        workload hears of nothing from here on, and no machine is started any more."""
        self.working = False
        self._wanted.clear()
        told = {n: each for n, each in self._execs.items() if not each.background}
        for number, each in told.items():
            message = SignalExec(number=number, signal=signal.SIGTERM)
            self.ask(each.machine, message, lambda _: None, _SIGNAL_ASK_TIMEOUT)
        return bool(told)

    def ask(
        self,
        machine: FleetMachine,
        message: Message,
        then: Callable[[Message], None],
        timeout: float,
    ) -> None:
        """Ask a machine's VM actor; `then` is not called once the machine is closed or lost, or
        the workload is told of nothing any more."""

        def answered(outcome: Message) -> None:
            if self.working and not machine.closed:
                then(outcome)

        self._run.ask(self._address(machine), message, answered, timeout=timeout)

    def _address(self, machine: FleetMachine) -> str:
        return f"{self._run.system.node.name}/{machine.path}"
