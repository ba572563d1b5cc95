"""The guest image a machine boots: looked up, and found fit for it, before anything is started."""

from __future__ import annotations

from voidbus.vm.image.store import GuestImage, image_for, require_memory, require_modules
from voidbus.vm.machine import MachineSpec

# The agent loads what it needs of these by name (`vm/guest/boot.py`, `vm/guest/layers.py`).
_EVERY_MACHINE = ("virtio_mmio", "vmw_vsock_virtio_transport")
# A guest is told of many mounts by a disk (`RootDisks` has the others).
_MOUNTS = ("virtiofs", "virtio_blk")
_LAYERS = ("virtio_blk", "squashfs", "overlay")
_NETWORK = ("virtio_net",)


def boot_image(spec: MachineSpec) -> GuestImage:
    """The image `spec` asks for. Raises ImageError where it is not there or damaged, where the
    memory can't hold it, and where it lacks kernel modules this machine needs."""
    image = image_for(spec.kernel, spec.initramfs)
    require_memory(image, spec.memory_mb)
    require_modules(image, needed_modules(spec))
    return image


def needed_modules(spec: MachineSpec) -> tuple[str, ...]:
    """The kernel modules a machine can't do without, by name."""
    return (
        *_EVERY_MACHINE,
        *(_MOUNTS if spec.mounts else ()),
        *(_LAYERS if spec.root is not None or spec.agent is not None or spec.images else ()),
        *(_NETWORK if spec.network else ()),
    )
