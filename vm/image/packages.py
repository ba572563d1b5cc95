"""Distribution packages by name: which version apt has, fetched without installing anything.

`apt-get download` and `dpkg-deb` do it as an ordinary user. Nothing outside the given directory
is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.publishing import TEMPORARY, explained

RESOLVE_SECONDS = 60.0
"""apt reads its lists for this; seconds, as all times here."""

DOWNLOAD_SECONDS = 900.0
UNPACK_SECONDS = 120.0

ARCHITECTURE = "amd64"


@dataclass(frozen=True, slots=True)
class Package:
    """A version of a package in apt's lists. `size` is that of its file, in bytes."""

    name: str
    version: str
    sha256: str
    size: int
    depends: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """What the package's file is called here."""
        return package_file(self.name, self.sha256)


def package_file(name: str, sha256: str) -> str:
    """What a package's file is called: the name alone doesn't tell one build from another."""
    return f"{name}_{sha256[:16]}.deb"


def resolve(names: Sequence[str]) -> list[Package]:
    """What apt would install for each name, in the same order. Raises ImageError."""
    wanted = [f"{name}:{ARCHITECTURE}" for name in names]
    shown = _run(["apt-cache", "show", "--no-all-versions", *wanted], RESOLVE_SECONDS, check=False)
    found = {}
    for stanza in shown.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
        if {"Package", "Version", "SHA256", "Size"} <= fields.keys():
            found[fields["Package"]] = _package(fields)
    missing = [name for name in names if name not in found]
    if missing:
        raise ImageError(
            f"apt knows no package {', '.join(missing)}; run `sudo apt-get update` (images are "
            "built from the packages of Debian 12)"
        )
    return [found[name] for name in names]


def _package(fields: dict[str, str]) -> Package:
    depends = tuple(
        part.split()[0].partition(":")[0] for part in fields.get("Depends", "").split(",") if part
    )
    return Package(
        fields["Package"], fields["Version"], fields["SHA256"], int(fields["Size"]), depends
    )


def download(
    packages: Sequence[Package], folder: Path, report: Callable[[str], None]
) -> dict[str, Path]:
    """The packages' files in `folder` by package name; those there already are not fetched again.

    Each is checked against the digest in apt's lists, which apt has checked by signature. Raises
    ImageError.
    """
    files = {package.name: folder / package.file_name for package in packages}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        missing = [p for p in packages if not _is_whole(files[p.name], p)]
        if missing:
            _fetch(missing, folder, report)
    return files


def _fetch(missing: list[Package], folder: Path, report: Callable[[str], None]) -> None:
    report(f"fetching {len(missing)} packages ({sum(p.size for p in missing) / 1e6:.0f} MB)")
    staging = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        command = ["apt-get", "download", "-qq"]
        if os.geteuid() == 0:
            # Else apt fetches as a user of its own, who can't write here.
            command += ["-o", "APT::Sandbox::User=root"]
        command += [f"{p.name}:{ARCHITECTURE}={p.version}" for p in missing]
        _run(command, DOWNLOAD_SECONDS, cwd=staging)
        for package in missing:
            fetched = next(iter(staging.glob(f"{package.name}_*.deb")), None)
            if fetched is None or not _is_whole(fetched, package):
                raise ImageError(
                    f"the package {package.name} {package.version} was not fetched whole; run "
                    "`sudo apt-get update`, then `voidbus image build` again"
                )
            fetched.replace(folder / package.file_name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_whole(path: Path, package: Package) -> bool:
    try:
        if path.stat().st_size != package.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256
    except FileNotFoundError:
        return False


def unpack(package: Path, folder: Path) -> None:
    """What the package would install, below `folder`. Raises ImageError, and OSError for a full
    disk."""
    _run(["dpkg-deb", "--extract", str(package), str(folder)], UNPACK_SECONDS)


def _run(command: list[str], timeout: float, *, cwd: Path | None = None, check: bool = True) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise ImageError(
            f"{command[0]} is not on this host: guest images are built from Debian packages, on "
            "Debian 12 or in a container of it; elsewhere give a guest by VOID_BOX_KERNEL and "
            "VOID_BOX_INITRAMFS"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(
            f"`{' '.join(command[:2])}` took over {timeout:.0f} s; check the network and try again"
        ) from error
    if check and done.returncode:
        full = os.strerror(errno.ENOSPC)
        if full in done.stderr:
            raise OSError(errno.ENOSPC, f"{full} (told by {command[0]})")
        said = " | ".join(line for line in done.stderr.splitlines() if line.strip())[-600:]
        raise ImageError(
            f"`{' '.join(command[:2])}` failed ({done.returncode}): {said or 'no word why'}; "
            "check the network, the disk and `sudo apt-get update`"
        )
    return done.stdout
