"""Read-only layers: squashfs files in the store, made of a stream of tar.

They are made by `sqfstar` as an ordinary user: owners and devices are only told to it, in the tar
stream. LZ4 is what a guest decompresses fastest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from voidbus.vm.image import publishing
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.manifest import Manifest, read_manifest
from voidbus.vm.image.squashfs import set_root_time

LAYER_SECONDS = 1800.0
"""How long making one layer may take, and how long one waits for another process's."""

_TOOL = "sqfstar"
# The same stream gives the same bytes, but for the time of the topmost directory: see `squashfs`,
# which needs the table of inodes as it is (-noI).
_OPTIONS = (
    *("-comp", "lz4", "-Xhc", "-noI", "-reproducible", "-mkfs-time", "0"),
    *("-root-mode", "0755", "-root-uid", "0", "-root-gid", "0"),
    # The file it writes to is there already; what it would only warn of is an error.
    *("-no-xattrs", "-quiet", "-no-progress", "-force", "-exit-on-error", "-mem", "512M"),
)
_BLOCK = 1 << 20

Writer = Callable[[BinaryIO], None]
"""Writes a whole tar archive to the stream it is given."""


def layer_of_tar(root: Path, identity: str, name: str, write: Writer) -> Path:
    """The layer in the store at `root` known by `identity`; where there is none, it is made of
    the tar archive that `write` writes. `name` is what messages call it. Raises ImageError."""
    key = hashlib.sha256(f"{identity} {' '.join(_OPTIONS)}".encode()).hexdigest()[:32]
    final = root / "layers" / f"{key}.squashfs"
    if _is_whole(root, final):
        return final
    with publishing.locked(root / "layers.lock", LAYER_SECONDS):
        if not _is_whole(root, final):  # another process may have made it meanwhile
            with publishing.new_file(final) as path:
                _make(path, name, write)
            record = Manifest(name=name, files=(publishing.stored_file(final, root),))
            with publishing.new_file(final.with_suffix(".json")) as path:
                path.write_text(record.to_json())
    return final


def _is_whole(root: Path, layer: Path) -> bool:
    try:
        manifest = read_manifest(layer.with_suffix(".json"))
    except ImageError:
        return False
    return not any(publishing.damage(root, record) for record in manifest.files)


def _make(path: Path, name: str, write: Writer) -> None:
    with _nameless_file(path) as log:
        try:
            child = subprocess.Popen(
                [_TOOL, *_OPTIONS, str(path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"},
            )
        except FileNotFoundError as error:
            raise ImageError(
                f"{_TOOL} is not on this host, so the layer {name} can't be made; install it with "
                "`sudo apt-get install squashfs-tools`"
            ) from error
        watch = threading.Timer(LAYER_SECONDS, child.kill)
        watch.start()
        try:
            broken = _feed(child, write)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            watch.cancel()
            watch.join()
        if code or broken:
            log.seek(0)
            said = " | ".join(log.read(400).decode(errors="replace").split("\n"))
            raise ImageError(
                f"the layer {name} could not be made: {_TOOL} ended with {code}: "
                f"{said.strip(' |') or 'without a word'}; check the space on the disk of {path}"
            )
    set_root_time(path, 0)


def _nameless_file(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """For what the tool says: it never waits for a reader, and the file goes with its handle."""
    descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "rb+")


def _feed(child: subprocess.Popen[bytes], write: Writer) -> bool:
    """Gives the child its input. Whether it stopped reading before the end."""
    stream = child.stdin
    assert stream is not None
    try:
        # A fault of the writer ends the child's input: it is killed, not left to wait.
        write(cast("BinaryIO", stream))
        stream.close()
    except BrokenPipeError:
        return True
    finally:
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    return False
