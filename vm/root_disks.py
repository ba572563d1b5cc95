"""The file systems a machine has over its image, as disks, and what its kernel is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from voidbus.vm.image.agent_layers import agent_layer
from voidbus.vm.image.guest_image import GIVEN, GuestImage
from voidbus.vm.image.oci import unpack_image
from voidbus.vm.image.store import ImageError, default_store
from voidbus.vm.machine import MachineSpec


class RootDisks(NamedTuple):
    """``disks`` are read-only files, in the order the guest gets them; ``arguments`` are for the
    kernel's line; ``env`` is what the image that is the root says of its programs' environment."""

    disks: tuple[Path, ...]
    arguments: tuple[str, ...]
    env: tuple[tuple[str, str], ...]


def root_disks(spec: MachineSpec, image: GuestImage) -> RootDisks:
    """What a machine's root is made of. Raises ImageError; makes what the store lacks."""
    layers = [*_agent_layer(spec, image), *_images(spec, image)]
    arguments = []
    if layers:
        names = ",".join(disk_name(number) for number in range(len(layers)))
        arguments.append(f"voidbus.layers={names}")
    if spec.root is None:
        return RootDisks(tuple(layers), tuple(arguments), ())
    root = unpack_image(default_store().root, spec.root)
    arguments.append(f"voidbox.oci_rootfs_dev=/dev/{disk_name(len(layers))}")
    return RootDisks((*layers, root.layer), tuple(arguments), root.config.env)


def disk_name(number: int) -> str:
    """The guest's name for its block device: Linux numbers them in the order it finds them."""
    return f"vd{chr(ord('a') + number)}"


def _agent_layer(spec: MachineSpec, image: GuestImage) -> list[Path]:
    """The layer of the machine's agent. An image of the user's own may bring the agent itself,
    and two files that are not ours may know nothing of layers."""
    if spec.agent is None or image.name == GIVEN:
        return []
    try:
        return [agent_layer(default_store().root, spec.agent).layer]
    except ImageError:
        if spec.root is None:
            raise
        return []


def _images(spec: MachineSpec, image: GuestImage) -> list[Path]:
    """The layers of the images whose files lie somewhere in the guest."""
    if spec.images and image.name == GIVEN:
        raise ImageError(
            f"the image {spec.images[0].reference} can't be mounted in a guest of another kernel "
            "and initramfs than voidbus's own; leave these out"
        )
    if not spec.images:
        return []
    store = default_store().root
    return [unpack_image(store, each.reference, each.guest_path).layer for each in spec.images]
