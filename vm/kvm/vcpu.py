"""One vCPU: its registers, and running it until it needs something."""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import mmap
import os
import signal

from voidbus.vm.kvm import calls
from voidbus.vm.kvm.calls import KvmError, ioctl
from voidbus.vm.kvm.structures import (
    CpuidTable,
    KvmFpu,
    KvmLapicState,
    KvmMpState,
    KvmRegs,
    KvmRun,
    KvmSregs,
    KvmTranslation,
    SignalMask,
    msr_list,
)

KICK = signal.SIGRTMIN + 6
"""What interrupts a guest, sent to the vCPU's own thread. It is blocked there but while the guest
runs (KVM_SET_SIGNAL_MASK, api.rst 4.21); so none is lost between looking for something to do and
running, none ever reaches a handler, and the process's own signals are left alone."""

_RUN = calls.RUN.number
_DATA = KvmRun.cause.offset


class ExitReason(enum.IntEnum):
    """Why the guest stopped (KVM_EXIT_..., `linux/kvm.h`): those a machine like ours may meet."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26


class Vcpu:
    """A vCPU. Owns its descriptor and the memory it shares with the kernel. One thread at a time
    uses it: that which runs it, from the first ``run`` on."""

    def __init__(self, fd: int, run_bytes: int, number: int) -> None:
        """``fd`` is owned from now on. Raises OSError."""
        self.number = number
        self._fd = fd
        try:
            self._shared = mmap.mmap(fd, run_bytes)
        except BaseException:
            os.close(fd)
            raise
        self.state = KvmRun.from_buffer(self._shared)
        """What the last exit says."""

    # -- running --------------------------------------------------------------------------

    def prepare_thread(self) -> None:
        """On the thread that is going to ``run``: block every signal there, and let KICK alone
        interrupt the guest. Raises KvmError."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        # Bit n - 1 stands for signal n; what is set is blocked.
        blocked = ~(1 << (KICK - 1)) & ((1 << 64) - 1)
        ioctl(self._fd, calls.SET_SIGNAL_MASK, SignalMask(8, blocked))

    def run(self) -> int | None:
        """Run the guest until it needs something (an ExitReason, or a number that is none), or
        until a KICK came: None. Raises KvmError."""
        try:
            fcntl.ioctl(self._fd, _RUN, 0)
        except InterruptedError:
            return None
        except OSError as error:
            # A vCPU that waits to be started by another comes back without a reason.
            if error.errno == errno.EAGAIN:
                return None
            raise KvmError(calls.RUN, "", error.errno or 0) from error
        return int(self.state.exit_reason)

    @staticmethod
    def take_kick() -> None:
        """On its thread: take a KICK that is pending."""
        signal.sigtimedwait([KICK], 0)

    # Plain values, as a view into the shared memory that somebody keeps would keep it mapped.

    def port_access(self) -> tuple[bool, int, int]:
        """At ExitReason.IO: whether it writes, the bytes of each element, and the port."""
        io = self.state.cause.io
        return bool(io.direction), io.size, io.port

    def mmio_access(self) -> tuple[int, int, int | None]:
        """At ExitReason.MMIO: the address, the bytes, and what is written, if it is."""
        access = self.state.cause.mmio
        value = int.from_bytes(bytes(access.data), "little") if access.is_write else None
        return access.phys_addr, access.len, value

    def answer_mmio(self, value: int) -> None:
        """What a read at ExitReason.MMIO gives: 64 bits, of which it takes what it asked for."""
        self.state.cause.mmio.data[:] = value.to_bytes(8, "little")

    def data(self) -> memoryview:
        """The bytes of the port access it stopped at, to read or to fill."""
        io = self.state.cause.io
        start, size = io.data_offset, io.size * io.count
        return memoryview(self._shared)[start : start + size]

    # -- registers ------------------------------------------------------------------------

    def registers(self) -> KvmRegs:
        """Raises KvmError, as all below."""
        registers = KvmRegs()
        ioctl(self._fd, calls.GET_REGS, registers)
        return registers

    def set_registers(self, registers: KvmRegs) -> None:
        ioctl(self._fd, calls.SET_REGS, registers)

    def system_registers(self) -> KvmSregs:
        registers = KvmSregs()
        ioctl(self._fd, calls.GET_SREGS, registers)
        return registers

    def set_system_registers(self, registers: KvmSregs) -> None:
        ioctl(self._fd, calls.SET_SREGS, registers)

    def set_fpu(self, state: KvmFpu) -> None:
        ioctl(self._fd, calls.SET_FPU, state)

    def set_msrs(self, registers: dict[int, int]) -> None:
        """KvmError also where KVM does not know one of them."""
        done = ioctl(self._fd, calls.SET_MSRS, msr_list(registers))
        if done != len(registers):
            raise KvmError(calls.SET_MSRS, f"{list(registers)[done]:#x}", errno.EINVAL)

    def set_cpuid(self, table: CpuidTable) -> None:
        ioctl(self._fd, calls.SET_CPUID2, table)

    def local_apic(self) -> KvmLapicState:
        state = KvmLapicState()
        ioctl(self._fd, calls.GET_LAPIC, state)
        return state

    def set_local_apic(self, state: KvmLapicState) -> None:
        ioctl(self._fd, calls.SET_LAPIC, state)

    def mp_state(self) -> int:
        """KVM_MP_STATE_...: 0 where it runs or may run."""
        state = KvmMpState()
        ioctl(self._fd, calls.GET_MP_STATE, state)
        return int(state.mp_state)

    def physical_address(self, linear: int) -> int | None:
        """Where a linear address of the guest leads, if anywhere."""
        translation = KvmTranslation(linear_address=linear)
        ioctl(self._fd, calls.TRANSLATE, translation)
        return int(translation.physical_address) if translation.valid else None

    def close(self) -> None:
        """Free it; nobody runs it any more. Again is fine."""
        if self._fd >= 0:
            del self.state
            with contextlib.suppress(BufferError):  # put off until the last view is gone
                self._shared.close()
            os.close(self._fd)
            self._fd = -1
