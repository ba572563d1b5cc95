"""The file systems every machine has, and the directories of the host it is given."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

from . import kernel
from .boot_line import Share
from .identity import Identity

_PLAIN = kernel.MS_NOSUID | kernel.MS_NODEV

KERNEL_FILE_SYSTEMS = (
    ("proc", "/proc", "proc", _PLAIN | kernel.MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", _PLAIN | kernel.MS_NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", kernel.MS_NOSUID, "mode=0755"),
    # Protocol, "Guest agent boot".
    ("devpts", "/dev/pts", "devpts", kernel.MS_NOSUID | kernel.MS_NOEXEC,
     "newinstance,ptmxmode=0666,mode=0620"),
    ("tmpfs", "/dev/shm", "tmpfs", _PLAIN, "mode=1777"),  # noqa: S108 - a mount point
    ("tmpfs", "/tmp", "tmpfs", _PLAIN, "mode=1777"),  # noqa: S108 - a mount point
    ("tmpfs", "/run", "tmpfs", _PLAIN, "mode=0755"),
)  # fmt: skip
"""Source, place, type, flags and options, in the order they are mounted."""

_DEVICE_LINKS = (
    ("/dev/ptmx", "pts/ptmx"),
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PROBE = ".voidbus-probe"


def mount_kernel_file_systems() -> list[str]:
    """Mount what the kernel offers and empty file systems in memory. What failed, and why."""
    faults: list[str] = []
    for source, target, kind, flags, options in KERNEL_FILE_SYSTEMS:
        try:
            os.makedirs(target, exist_ok=True)  # noqa: PTH103 - pathlib loads slowly
            kernel.mount(source, target, kind, flags, options)
        except OSError as error:
            if error.errno != errno.EBUSY:  # EBUSY: mounted already
                faults.append(f"mount of {target}: {error.strerror}")
    for path, leads_to in _DEVICE_LINKS:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108 - pathlib loads slowly
            os.symlink(leads_to, path)  # noqa: PTH211
        except OSError as error:
            faults.append(f"link {path}: {error.strerror}")
    return faults


def cover_file(path: str, content: bytes, kept_at: str) -> None:
    """Lay a read-only file with other content over a file, for everybody and for good; the
    content is kept at ``kept_at``, which must be in memory. Raises OSError."""
    fd = os.open(kept_at, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)
    kernel.mount(kept_at, path, None, kernel.MS_BIND)
    kernel.mount(kept_at, path, None, kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY)


@contextlib.contextmanager
def place(path: str, root: str = "/") -> Iterator[int]:
    """The opened directory ``path`` below ``root``, made where it is missing. No link is
    followed on the way, so an image can't lead it elsewhere. Raises OSError: ENOTDIR or ELOOP
    where there is a link or a file."""
    fd = os.open(root, _DIRECTORY)
    try:
        for name in path.split("/"):
            if not name:
                continue
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=fd)
            below = os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def mount_share(share: Share, owner: Identity) -> list[str]:
    """Mount a directory of the host: as virtio-fs, else as 9p (protocol, "Mounts"). A writable
    one must be so for ``owner``. What failed, and why."""
    what = f"mount of {share.guest_path} ({share.tag})"
    try:
        with place(share.guest_path) as under:
            fault = mount_at(share, f"/proc/self/fd/{under}")
        if fault is not None:
            return [f"{what}: {fault}"]
        if share.writable:
            _make_writable(share.guest_path, owner)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            reason = "there is a link or a file on the way, and links are not followed"
        return [f"{what}: {reason}"]
    return []


def mount_at(share: Share, target: str) -> str | None:
    """Mount a share at an existing directory; why that failed, or None."""
    flags = _PLAIN | (0 if share.writable else kernel.MS_RDONLY)
    tries = [("virtiofs", "")]
    common = "trans=virtio,version=9p2000.L,msize=65536"
    tries += [("9p", f"{common}{access}") for access in (",access=any", ",access=1000", "")]
    faults: list[str] = []
    for kind, options in tries:
        try:
            kernel.mount(share.tag, target, kind, flags, options)
        except OSError as error:
            text = f"{kind}: {error.strerror}"
            if text not in faults:
                faults.append(text)
        else:
            return None
    return "; ".join(faults)


def _make_writable(path: str, owner: Identity) -> None:
    """See to it that programs can write at a mount's root. Raises OSError when they can't."""
    steps: tuple[Callable[[], None], ...] = (
        lambda: None,
        lambda: os.chown(path, owner.uid, owner.gid),
        lambda: os.chmod(path, 0o777),  # noqa: S103, PTH101 - the machine's only user is meant
    )
    failure: OSError | None = None
    for step in steps:
        try:
            step()
            _try_writing(path, owner)
        except OSError as error:
            failure = error
        else:
            return
    assert failure is not None
    raise OSError(failure.errno, f"the mount is writable, but not by programs: {failure.strerror}")


def _try_writing(path: str, owner: Identity) -> None:
    """Make, rename and remove a file as ``owner``. Raises OSError. Only before threads exist:
    the effective user is the whole process's."""
    first, second = f"{path}/{_PROBE}-{os.getpid()}", f"{path}/{_PROBE}-{os.getpid()}-renamed"
    os.setegid(owner.gid)
    os.seteuid(owner.uid)
    try:
        os.close(
            os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
        )
        os.rename(first, second)  # noqa: PTH104 - pathlib loads slowly
        os.unlink(second)  # noqa: PTH108
    finally:
        os.seteuid(0)
        os.setegid(0)


def make_directories(paths: tuple[str, ...], owner: Identity) -> list[str]:
    """Make directories that belong to ``owner``, without following links. What failed, and
    why."""
    faults: list[str] = []
    for path in paths:
        try:
            with place(path) as fd:
                os.fchown(fd, owner.uid, owner.gid)
                if not stat.S_IMODE(os.fstat(fd).st_mode) & stat.S_IWUSR:
                    os.fchmod(fd, 0o755)
        except OSError as error:
            faults.append(f"directory {path}: {error.strerror}")
    return faults


def replace_file(folder: int, name: str, content: bytes, mode: int) -> None:
    """Put a new file in the place of whatever has the name in an opened directory, a link
    included. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(name, flags, mode, dir_fd=folder)
    try:
        os.fchmod(fd, mode)
        pending = memoryview(content)
        while pending:
            pending = pending[os.write(fd, pending) :]
    finally:
        os.close(fd)
