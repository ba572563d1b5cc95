"""Directories of the host in a process machine: links in its scratch directory.

A link is all there is to it: programs run as the host's user, so nothing holds them to reading
and nothing keeps them in. Whoever removes the scratch directory removes the links and not what
they lead to.
"""

from __future__ import annotations

import errno

from voidbus.vm.guest.place import HostDirectory
from voidbus.vm.machine import MachineError, MachineSpec, Mount

PLACES = (("workspace",), ("home", "sandbox"), ("tmp",))
"""Below these of the machine's own directories there may be mounts."""


def link_mounts(spec: MachineSpec) -> tuple[HostDirectory, ...]:
    """Make the links of a machine's mounts, and the directories of writable ones that are
    missing. Raises MachineError, before anything is made where the guest paths are at fault."""
    names = [_names(spec.name, mount) for mount in spec.mounts]
    for number, mine in enumerate(names):
        for other in (*names[:number], *names[number + 1 :]):
            if mine[: len(other)] == other:
                raise MachineError(
                    f"machine {spec.name}: the mount at /{'/'.join(mine)} is inside the one at "
                    f"/{'/'.join(other)}, which a mock machine can't do; mount them side by side"
                )
    return tuple(_link(spec, mount, mine) for mount, mine in zip(spec.mounts, names, strict=True))


def _names(machine: str, mount: Mount) -> tuple[str, ...]:
    path = mount.guest_path
    names = tuple(name for name in path.split("/") if name not in ("", "."))
    below = any(names[: len(place)] == place and names != place for place in PLACES)
    if not path.startswith("/") or ".." in names or "\0" in path or not below:
        places = ", ".join("/" + "/".join(place) for place in PLACES)
        raise MachineError(
            f"machine {machine}: the mount at {path} is not below one of {places}, and a mock "
            "machine has no other directories of its own; mount it there, or use a virtual machine"
        )
    return names


def _link(spec: MachineSpec, mount: Mount, names: tuple[str, ...]) -> HostDirectory:
    host = mount.host_path
    try:
        if mount.writable:
            host.mkdir(parents=True, exist_ok=True)
        real = host.resolve(strict=True)
        if not real.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is no directory")
        link = spec.scratch.joinpath(*names)
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(real, target_is_directory=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise MachineError(
            f"machine {spec.name}: the mount of {host} at {mount.guest_path} could not be made: "
            f"{what}; check that it is a directory"
        ) from error
    return HostDirectory("/" + "/".join(names), str(real), mount.writable)


def not_enforced(mounts: tuple[HostDirectory, ...]) -> tuple[str, ...]:
    """What a run should be told: where `ro` holds back the host's own requests only."""
    return tuple(
        f"mount of {mount.guest_path}: a mock machine can't keep programs from writing to "
        f"{mount.host_path}, although it is read-only"
        for mount in mounts
        if not mount.writable
    )
