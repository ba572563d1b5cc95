"""A Firecracker with the kernel and image of ours, and our guest agent in it.

Where a program `firecracker` is in PATH. No jailer: it is measured, not trusted.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from typing import ClassVar

from voidbus.vm.boot_arguments import first_arguments
from voidbus.vm.boot_image import boot_image
from voidbus.vm.image_machine import AGENT_PORT, ImageMachine
from voidbus.vm.kernel_line import kernel_line
from voidbus.vm.kvm.guest_devices import GUEST_CID, NOT_THERE
from voidbus.vm.machine import Lease, MachineError, MachineExit, MachineSpec

PROGRAM = shutil.which("firecracker")

_ANSWER_SECONDS = 1.0
_END_SECONDS = 10.0


class FirecrackerMachine(ImageMachine):
    """Processors, memory, a vsock and an entropy device, as a machine of ours has them."""

    name: ClassVar[str] = "firecracker"
    isolation: ClassVar[str] = "vm"

    def __init__(
        self,
        spec: MachineSpec,
        *,
        on_exit: Callable[[MachineExit], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        super().__init__(spec, on_exit=on_exit, on_lease=on_lease)
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None

    def _launch(self, deadline: float) -> None:
        if PROGRAM is None:
            raise MachineError("there is no firecracker in PATH")
        spec = self.spec
        image = boot_image(spec)
        settings = {
            "boot-source": {
                "kernel_image_path": str(image.kernel),
                "initrd_path": str(image.initramfs),
                "boot_args": kernel_line([*NOT_THERE, *first_arguments(spec)]),
            },
            "machine-config": {"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mb},
            "vsock": {"guest_cid": GUEST_CID, "uds_path": "vsock.sock"},
            "entropy": {},
            "drives": [],
        }
        # In memory, and not on a disk: the channel's secret is in it.
        with tempfile.TemporaryFile("w", dir="/dev/shm") as config:
            json.dump(settings, config)
            config.flush()
            self._process = self._spawn(config.fileno())
        self._watcher = threading.Thread(target=self._watch, args=(self._process,))
        self._watcher.start()

    def _spawn(self, config: int) -> subprocess.Popen[bytes]:
        assert PROGRAM is not None
        return subprocess.Popen(
            [PROGRAM, "--no-api", "--config-file", f"/proc/self/fd/{config}"],
            cwd=self.spec.scratch,
            pass_fds=[config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Keep what it and its guest's console say, until it ends."""
        assert process.stdout is not None
        with process.stdout as output:
            while data := os.read(output.fileno(), 65536):
                self._console.add(data)
        code = process.wait()
        self._gone.set()
        self._on_exit(MachineExit(f"firecracker ended with {code}", code))

    def _connect(self) -> socket.socket:
        """Firecracker, docs/vsock.md, "Host-Initiated Connections"."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_ANSWER_SECONDS)
            sock.connect(str(self.spec.scratch / "vsock.sock"))
            sock.sendall(b"CONNECT %d\n" % AGENT_PORT)
            answer = b""
            while not answer.endswith(b"\n"):
                byte = sock.recv(1)  # what follows the line is the guest's
                if not byte:
                    raise ConnectionError("nothing listens in the guest yet")
                answer += byte
        except BaseException:
            sock.close()
            raise
        return sock

    def _image_env(self) -> tuple[tuple[str, str], ...]:
        return ()

    def _terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        with self._lock:
            self._stopping.set()
        if self._process is not None:
            self._process.kill()

    def _release(self) -> None:
        if self._watcher is not None:
            self._watcher.join(_END_SECONDS)
