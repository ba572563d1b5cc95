"""A host with hardware virtualisation, for hosts that have none: a Linux of its own in an emulated
machine with SVM, so that `/dev/kvm` there is the real kvm-amd's.

It sees this host's files read-only, with a scratch in memory over them; only what is written to
`build/lab` stays, beside the lab's own console. Everything in it is slow: a guest boots in six
seconds. `scripts/kvm-lab` runs a command in it, and `scripts/lab` tests (`lab_python.py`).
"""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from voidbus.vm.image.cpio import Entry, directory, regular, write_archive
from voidbus.vm.image.store import default_store
from voidbus.vm.qemu.process import PROGRAM

META_PACKAGE = "linux-image-amd64"
MODULES = (
    *("virtio_pci", "9pnet_virtio", "9p", "overlay"),
    *("virtio_console", "kvm_amd", "vhost_vsock"),
)
LAB_SECONDS = 2400.0
"""After which the lab is ended, whatever it is at."""

RESULTS = Path("build/lab").absolute()
"""Where files of the command's own stay."""

EMPTY = RESULTS / "empty"
"""In each lab a folder in its own memory, with one for temporary files of tests in it."""

_PROCESSOR = "EPYC,+svm,+npt,-xsave"
"""Without XSAVE: with it a guest's kernel warns of an "XSAVE consistency problem: size 832 !=
kernel_size 576". Its XSETBV does not reach KVM (QEMU 7.2), so which registers are kept is luck."""

_SHARE = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"
_RESULTS_SHARE = f"local,path={RESULTS},mount_tag=results,security_model=none"

_INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /order); do insmod /modules/$module; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
mount -t tmpfs scratch /scratch
mkdir /scratch/upper /scratch/work
mount -t overlay overlay -o lowerdir=/host,upperdir=/scratch/upper,workdir=/scratch/work /root
for place in proc sys dev; do mount --move /$place /root/$place; done
mkdir -p /root/dev/shm /root/dev/pts
mount -t devpts devpts /root/dev/pts
for place in run dev/shm; do mount -t tmpfs tmpfs /root/$place; done
mkdir -m 1777 /root/run/tmp
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 results /root$(cat /place)
mount -t tmpfs tmpfs /root$(cat /empty)
mkdir /root$(cat /empty)/tests
# A page of a guest's memory that is used first is an exit, and there slow: let it be a big one.
echo always > /root/sys/kernel/mm/transparent_hugepage/shmem_enabled
chmod 666 /root/dev/kvm /root/dev/vhost-vsock
ip link set lo up
cp /bin/busybox /command /ending /root/run
# Not chroot: what is in one may make no user namespace (unshare(2), EPERM), as passt does.
exec switch_root /root /run/busybox sh /run/ending
"""
_ENDING = r"""/bin/sh /run/command
echo "lab: exit $?"
/run/busybox poweroff -f
"""


def fetched_kernel() -> Path:
    """The unpacked package of a whole Debian kernel: fetched by apt, not installed."""
    cache = default_store().root.parent / "lab"
    shown = subprocess.run(
        ["apt-cache", "depends", META_PACKAGE], capture_output=True, text=True, check=True
    ).stdout
    (package, *_) = re.findall(r"Depends: (linux-image-\S+)", shown)
    unpacked: Path = cache / package
    if not unpacked.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # Its words are no output of whoever asks.
            fetch = ["apt-get", "-q", "download", package]
            subprocess.run(fetch, cwd=folder, check=True, stdout=sys.stderr)
            (archive,) = Path(folder).glob("*.deb")
            target = Path(folder) / "unpacked"
            subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
            (release,) = (target / "lib/modules").iterdir()
            subprocess.run(["depmod", "-b", target, release.name], check=True)
            try:
                target.rename(unpacked)
            except OSError:
                if not unpacked.exists():  # another lab's was as good
                    raise
    return unpacked


def needed_modules(folder: Path) -> list[Path]:
    """The files of MODULES and of what they need, in the order to load them in."""
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        file, _, others = line.partition(":")
        needs[file] = others.split()
    by_name = {Path(file).name.partition(".")[0].replace("-", "_"): file for file in needs}
    files: dict[str, None] = {}
    for name in MODULES:
        files |= dict.fromkeys([*reversed(needs[by_name[name]]), by_name[name]])
    return [folder / file for file in files]


def entries(kernel: Path, command: list[str], redirection: str = "") -> list[Entry]:
    """The lab's initramfs, for one command there and a shell's words of what its files are."""
    (release,) = (kernel / "lib/modules").iterdir()
    modules = needed_modules(release)
    busybox = default_store().current().kernel.parent / "root/usr/bin/busybox"
    script = (
        f"cd {shlex.quote(os.fspath(Path.cwd()))}\n"
        f"export HOME={shlex.quote(os.environ['HOME'])} PATH={shlex.quote(os.environ['PATH'])}\n"
        # Not /tmp, where the checkout may be: this one is in memory and empty.
        "export TMPDIR=/run/tmp\n"
        f"export PYTHONDONTWRITEBYTECODE=1 LC_ALL=C.UTF-8\n"
        f"exec {shlex.join(command)} {redirection}\n"
    )
    places = ("bin", "proc", "sys", "dev", "host", "scratch", "root", "modules")
    return [
        *(directory(place) for place in places),
        regular("bin/busybox", busybox.read_bytes(), 0o755),
        regular("init", _INIT.encode(), 0o755),
        regular("command", script.encode(), 0o644),
        regular("place", os.fsencode(RESULTS), 0o644),
        regular("empty", os.fsencode(EMPTY), 0o644),
        regular("ending", _ENDING.encode(), 0o644),
        regular("order", "\n".join(file.name for file in modules).encode(), 0o644),
        *(regular(f"modules/{file.name}", file.read_bytes(), 0o644) for file in modules),
    ]


def qemu_command(kernel: Path, initramfs: Path) -> list[str]:
    """The lab. One processor: with two the emulated SVM stops now and then, and is no faster."""
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    EMPTY.mkdir(parents=True, exist_ok=True)
    return [
        *("setpriv", "--pdeathsig", "KILL", PROGRAM),
        *("-M", "q35", "-accel", "tcg", "-cpu", _PROCESSOR),
        *("-m", "4G", "-smp", "1", "-nodefaults", "-no-reboot", "-display", "none"),
        *("-kernel", os.fspath(image), "-initrd", os.fspath(initramfs)),
        *("-virtfs", _SHARE, "-virtfs", _RESULTS_SHARE),
        *("-append", "console=ttyS0 loglevel=3 panic=-1 mitigations=off"),
    ]


def run(kernel: Path, initramfs: Path) -> int:
    """Boot the lab and show its console; the command's exit status."""
    deadline = time.monotonic() + LAB_SECONDS
    with (RESULTS / "console.log").open("wb", buffering=0) as kept:
        qemu = subprocess.Popen(
            [*qemu_command(kernel, initramfs), "-serial", "stdio"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # features of that processor which are not emulated
        )
        try:
            said = b""
            assert qemu.stdout is not None
            for piece in _pieces(qemu.stdout, deadline):
                kept.write(piece)
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
                said = said[-1000:] + piece
        finally:
            qemu.kill()
            qemu.wait()
    ended = re.search(rb"lab: exit (\d+)", said)
    if ended is None:
        sys.stderr.write(f"kvm-lab: the lab ended, or {LAB_SECONDS:g} s were over, with no word\n")
        return 1
    return int(ended[1])


def _pieces(output: IO[bytes], deadline: float) -> Iterator[bytes]:
    """What comes until the end or the deadline. By pieces: a line of dots is long in coming."""
    while select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(output.fileno(), 65536)
        if not piece:
            return
        yield piece


def main() -> int:
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        sys.stderr.write("scripts/kvm-lab COMMAND...: run it where there is a real KVM\n")
        return 2
    kernel = fetched_kernel()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(suffix=".cpio") as initramfs:
        with Path(initramfs.name).open("wb") as file:
            write_archive(entries(kernel, command), file)
        return run(kernel, Path(initramfs.name))


if __name__ == "__main__":
    sys.exit(main())
