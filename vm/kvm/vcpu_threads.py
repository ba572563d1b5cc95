"""The threads that run a machine's vCPUs: start, pause, resume, stop, and what exits ask for."""

from __future__ import annotations

import enum
import logging
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from voidbus.vm.devices.bus import Bus
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.memory import GuestMemory
from voidbus.vm.kvm.calls import KvmError
from voidbus.vm.kvm.ending import Ending, EndKind, system_event, unable
from voidbus.vm.kvm.vcpu import KICK, ExitReason, Vcpu

log = logging.getLogger(__name__)

_FORMS = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<I")}
_MASKS = {size: (1 << 8 * size) - 1 for size in range(1, 9)}
_NOTHING_TO_DO = frozenset({ExitReason.INTR, ExitReason.IRQ_WINDOW_OPEN, ExitReason.SET_TPR})


class _Wish(enum.Enum):
    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"


class VcpuThreads:
    """Runs vCPUs, a thread each, until one of them ends the machine or ``stop`` does.

    ``on_end`` is called once, on a thread of a vCPU, when none of them runs any more; it must be
    quick and must not call this object.
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        memory: GuestMemory,
        ports: Bus,
        mmio: Bus,
        on_end: Callable[[Ending], None],
        *,
        name: str,
    ) -> None:
        """Everything is the caller's, and outlives the threads."""
        self._vcpus = tuple(vcpus)
        self._memory = memory
        self._ports = ports
        self._mmio = mmio
        self._on_end = on_end
        self._changed = threading.Condition()
        self._wish = _Wish.RUN
        self._ending: Ending | None = None
        self._running: set[Vcpu] = set()
        """vCPUs that may be in the guest, or at one of its exits."""
        self._alive: dict[Vcpu, int] = {}
        """The threads there are, as pthread_kill(3) names them."""
        self._kicked: set[Vcpu] = set()
        self.exits: Counter[str] = Counter()
        """How often the guest came to this process for what is on no bus, by reason. Written
        without a lock, for whoever measures."""
        self._threads = tuple(
            threading.Thread(
                target=self._serve, args=(vcpu,), name=f"{name}-vcpu{vcpu.number}", daemon=True
            )
            for vcpu in self._vcpus
        )

    # -- the owner's ----------------------------------------------------------------------

    def start(self) -> None:
        """Start them. Once. Raises RuntimeError (no threads), having ended those it started."""
        self._running = set(self._vcpus)
        for number, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError:
                with self._changed:
                    self._running -= set(self._vcpus[number:])
                self.stop()
                raise

    def pause(self, timeout: float) -> bool:
        """Bring every vCPU out of the guest and keep it there. Whether all are, within
        ``timeout`` seconds; they come out later if not. False also when they have ended."""
        with self._changed:
            if self._wish is _Wish.STOP:
                return False
            self._wish = _Wish.PAUSE
            self._kick()
            self._changed.wait_for(lambda: not self._running, timeout)
            return not self._running and self._wish is _Wish.PAUSE

    def resume(self) -> None:
        """Let them run on."""
        with self._changed:
            if self._wish is _Wish.PAUSE:
                self._wish = _Wish.RUN
                self._changed.notify_all()

    def stop(self, ending: Ending | None = None) -> None:
        """Have them end, for this reason unless there is another already. Returns at once. Any
        thread may call it, again."""
        with self._changed:
            if self._ending is None:
                self._ending = ending or Ending(EndKind.STOPPED, "stopped")
            self._wish = _Wish.STOP
            self._kick()
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """Whether every thread has ended, within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _kick(self) -> None:
        """With the lock: interrupt those that may be in the guest."""
        for vcpu in self._running - self._kicked:
            thread = self._alive.get(vcpu)
            if thread is not None:
                self._kicked.add(vcpu)
                signal.pthread_kill(thread, KICK)

    # -- a vCPU's thread --------------------------------------------------------------------

    def _serve(self, vcpu: Vcpu) -> None:
        try:
            vcpu.prepare_thread()
            with self._changed:
                self._alive[vcpu] = threading.get_ident()
            self._loop(vcpu)
        except (KvmError, DeviceError) as error:
            self.stop(Ending(EndKind.FAULT, f"vCPU {vcpu.number}: {error}"))
        except Exception as error:  # the end of the thread: whatever it was is told
            log.exception("a defect ended vCPU %d", vcpu.number)
            text = f"a defect at vCPU {vcpu.number}: {type(error).__name__}: {error}"
            self.stop(Ending(EndKind.FAULT, text))
        with self._changed:
            self._alive.pop(vcpu, None)  # from here on it is not kicked
            self._running.discard(vcpu)
            self._changed.notify_all()
            last = not self._alive and not self._running
            ending = self._ending
        if last and ending is not None:
            self._on_end(ending)

    def _loop(self, vcpu: Vcpu) -> None:
        io, mmio = int(ExitReason.IO), int(ExitReason.MMIO)
        while self._wish is _Wish.RUN or self._may_go_on(vcpu):
            reason = vcpu.run()
            if reason == io:
                self._port_access(vcpu)
            elif reason == mmio:
                self._mmio_access(vcpu)
            elif reason is None:
                self._take_kick(vcpu)
            else:
                ending = self._other(vcpu, reason)
                if ending is not None:
                    self.stop(ending)

    def _may_go_on(self, vcpu: Vcpu) -> bool:
        """Wait while the machine is paused. False: it has ended."""
        with self._changed:
            self._running.discard(vcpu)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wish is not _Wish.PAUSE)
            if self._wish is _Wish.STOP:
                return False
            self._running.add(vcpu)
            return True

    def _take_kick(self, vcpu: Vcpu) -> None:
        with self._changed:
            if vcpu in self._kicked:
                self._kicked.discard(vcpu)
                vcpu.take_kick()

    def _port_access(self, vcpu: Vcpu) -> None:
        out, size, port = vcpu.port_access()
        form = _FORMS[size]
        with vcpu.data() as data:
            for offset in range(0, len(data), size):  # more than one: a string instruction
                if out:
                    self._ports.write(port, size, form.unpack_from(data, offset)[0])
                else:
                    form.pack_into(data, offset, self._ports.read(port, size) & _MASKS[size])

    def _mmio_access(self, vcpu: Vcpu) -> None:
        address, size, value = vcpu.mmio_access()
        if not 1 <= size <= 8:
            raise DeviceError(f"an access of {size} bytes to {address:#x}")
        if value is not None:
            self._mmio.write(address, size, value & _MASKS[size])
        else:
            vcpu.answer_mmio(self._mmio.read(address, size) & _MASKS[size])

    def _other(self, vcpu: Vcpu, reason: int) -> Ending | None:
        self.exits[f"exit {reason}"] += 1  # as many as there are reasons
        if reason in _NOTHING_TO_DO:
            return None
        if reason == ExitReason.SHUTDOWN:
            return Ending(EndKind.GUEST, "reset by a triple fault")
        if reason == ExitReason.SYSTEM_EVENT:
            return system_event(vcpu)
        if reason == ExitReason.HLT:  # only without interrupt controllers
            return Ending(EndKind.GUEST, "halted, and nothing can wake it")
        return unable(vcpu, reason, self._memory)
