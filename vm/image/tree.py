"""The guest's file tree, from unpacked packages: what the recipe takes, in a merged /usr."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from voidbus.vm.image import cpio
from voidbus.vm.image.elf import MAGIC, Elf, ElfError
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.recipe import LIBRARIES, PYTHON, Recipe

# Debian's packages still name both places; guests have one (Debian's UsrMerge).
MERGED = ("bin", "sbin", "lib", "lib64")

_PAGE_BYTES = 4096
_LIST_SECONDS = 30.0
_CERTIFICATES = "usr/share/ca-certificates/mozilla"


def guest_path(path: str) -> str:
    """Where a package's path is in the guest: `bin/sh` is `usr/bin/sh`."""
    return f"usr/{path}" if path.partition("/")[0] in MERGED else path


def take(package: str, unpacked: Path, root: Path, recipe: Recipe) -> int:
    """Copies what the recipe takes of a package into `root`; the bytes copied."""
    taken = 0
    only = recipe.only.get(package, ("*",))
    for folder, names, files in os.walk(unpacked):
        for name in sorted((*files, *(n for n in names if Path(folder, n).is_symlink()))):
            source = Path(folder, name)
            path = guest_path(source.relative_to(unpacked).as_posix())
            if not _matches(path, only) or _matches(path, recipe.dropped):
                continue
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(source.readlink())
            else:
                shutil.copyfile(source, target)
                target.chmod(0o755 if source.stat().st_mode & 0o111 else 0o644)
                taken += target.stat().st_size
    return taken


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def finish(root: Path) -> None:
    """What packages do when they are installed: links, busybox's applets, certificates."""
    for name in MERGED:
        (root / name).symlink_to(f"usr/{name}")
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
    _link_applets(root)
    for name in ("python3", "python"):
        _link(root / "usr/bin" / name, PYTHON)
    _bundle_certificates(root)
    _check_libraries(root)


def _link(path: Path, target: str) -> None:
    if not path.is_symlink() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def _link_applets(root: Path) -> None:
    busybox = root / "usr/bin/busybox"
    try:
        listed = subprocess.run(
            [str(busybox), "--list-full"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIST_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ImageError(
            f"the guest's busybox doesn't run on this host: {error}; images are built on x86-64"
        ) from error
    for applet in listed.split():
        # `linuxrc` is for initial ramdisks of old; dpkg and rpm would pass for the real ones.
        if applet.rpartition("/")[2] not in ("linuxrc", "busybox", "dpkg", "dpkg-deb", "rpm"):
            path = root / guest_path(applet)
            _link(path, "busybox" if path.parent == busybox.parent else "/usr/bin/busybox")


def _bundle_certificates(root: Path) -> None:
    """One file of all certificates, where programs and OpenSSL's own default look for it."""
    sources = sorted((root / _CERTIFICATES).glob("*.crt"))
    if not sources:
        raise ImageError("the package ca-certificates has no certificates where they should be")
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_bytes(b"".join(source.read_bytes() for source in sources))
    bundle.chmod(0o644)
    shutil.rmtree(root / "usr/share/ca-certificates")
    _link(root / "usr/lib/ssl/cert.pem", "/etc/ssl/certs/ca-certificates.crt")


def _check_libraries(root: Path) -> None:
    """Every library a program or extension names must be there: found out now, not in a guest."""
    present = {path.name for path in (root / LIBRARIES).iterdir()}
    lacking = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        if not data.startswith(MAGIC) or path.suffix == ".ko":
            continue
        try:
            missing = set(Elf(data).needed()) - present
        except ElfError as error:
            raise ImageError(f"{path.relative_to(root)}: {error}") from error
        if missing:
            lacking[path.relative_to(root).as_posix()] = sorted(missing)
    if lacking:
        raise ImageError(f"the image's recipe lacks libraries: {lacking}")


def memory_bytes(root: Path) -> int:
    """What the files take in a guest's memory, which holds them in whole pages."""
    files = (path.lstat() for path in root.rglob("*"))
    sizes = (status.st_size for status in files if stat.S_ISREG(status.st_mode))
    return sum((size + _PAGE_BYTES - 1) // _PAGE_BYTES * _PAGE_BYTES for size in sizes)


def entries(root: Path) -> list[cpio.Entry]:
    """The tree as an archive's entries: owned by root, modes without what the umask left."""
    found = []
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                found.append(cpio.symlink(relative, os.fspath(path.readlink())))
            elif stat.S_ISDIR(status.st_mode):
                found.append(cpio.directory(relative))
            else:
                mode = 0o755 if status.st_mode & 0o111 else 0o644
                found.append(cpio.regular(relative, path, mode))
    return found
