"""What is written down of the KVM interface is what the kernel's headers say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from voidbus.vm.devices import vhost_calls
from voidbus.vm.kvm import system
from voidbus.vm.kvm.calls import ALL
from voidbus.vm.kvm.structures import (
    NAMED,
    KvmRun,
    RunExit,
    RunFailEntry,
    RunHardware,
    RunInternal,
    RunIo,
    RunMmio,
    RunSystemEvent,
)
from voidbus.vm.kvm.vcpu import ExitReason

UNION = {
    "hw": RunHardware,
    "fail_entry": RunFailEntry,
    "io": RunIo,
    "mmio": RunMmio,
    "internal": RunInternal,
    "system_event": RunSystemEvent,
}
CAPABILITIES = {
    **system.NEEDED,
    "MAX_VCPUS": system.MAX_VCPUS,
    "TSC_DEADLINE_TIMER": system.TSC_DEADLINE_TIMER,
    "SPLIT_IRQCHIP": system.SPLIT_IRQCHIP,
}


def expected() -> dict[str, int]:
    """A C expression for each number, and what we take it to be."""
    found = {call.name: call.number for call in ALL}
    found |= {call.name: call.number for call in vhost_calls.ALL}
    for structure in (*NAMED, *vhost_calls.NAMED):
        name = structure.c_name
        if structure is not KvmRun:
            found[f"sizeof({name})"] = structure_size(structure)
        for field, *_ in structure._fields_:
            if field != "cause":
                found[f"offsetof({name}, {field})"] = getattr(structure, field).offset
    start = KvmRun.cause.offset
    for member, part in UNION.items():
        assert getattr(RunExit, member).offset == 0
        for field, *_ in part._fields_:
            found[f"offsetof(struct kvm_run, {member}.{field})"] = (
                start + getattr(part, field).offset
            )
    found |= {f"KVM_CAP_{name}": number for name, number in CAPABILITIES.items()}
    found |= {f"KVM_EXIT_{reason.name}": reason.value for reason in ExitReason}
    return found


def structure_size(structure: type) -> int:
    import ctypes

    return ctypes.sizeof(structure)


@pytest.mark.needs("kvm-headers")
def test_every_number_size_and_offset_is_that_of_the_headers(tmp_path: Path) -> None:
    numbers = expected()
    lines = [f'printf("%llu\\n", (unsigned long long)({text}));' for text in numbers]
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
        "#include <linux/vhost.h>\n"
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = tmp_path / "numbers"
    subprocess.run(["cc", "-o", program, source], check=True, timeout=50)
    said = subprocess.run([program], check=True, capture_output=True, text=True, timeout=10).stdout
    assert dict(zip(numbers, map(int, said.split()), strict=True)) == numbers
