"""Merging the layers of a container image into one tree, streamed as one tar archive.

The rules are the OCI image specification's (`layer.md`): a later layer replaces what an earlier
one has; `.wh.NAME` takes NAME of the earlier layers away, `.wh..wh..opq` all its directory had.

Every layer is read twice: once for its headers, to know what is left in the end, and once for the
content of just that. So memory holds a tree of names, never content. The tree is only a tree of
names: nothing in an archive can lead to a file of the host.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.tar_source import Member, members

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
_AUFS = ".wh..wh."
"""Other names that begin so are notes aufs kept for itself."""

MAX_SYMLINKS = 40
"""How many links a path may lead through (path_resolution(7))."""

_NAME_BYTES = 255
_PATH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may come to: entries over all layers, bytes of all layers uncompressed, bytes
    of all names and link targets, how deep directories lie."""

    entries: int = 500_000
    bytes: int = 32 << 30
    name_bytes: int = 128 << 20
    depth: int = 128


@dataclass(frozen=True, slots=True)
class LayerSource:
    """A layer: what it is called in messages, and how to read it uncompressed from the start.
    The stream checks the layer's digest when it has been read to the end."""

    name: str
    open: Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(slots=True)
class _Inode:
    """What one or more names stand for: a member of a layer, by its number there, and what a
    squashfs keeps of it. `kind` is tar's type; `target` is a symbolic link's."""

    layer: int
    number: int
    kind: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    target: str = ""
    paths: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, layer: int, number: int, info: tarfile.TarInfo) -> _Inode:
        kind = tarfile.REGTYPE if info.isreg() else info.type
        return cls(
            *(layer, number, kind, info.mode & 0o7777),
            uid=info.uid if 0 <= info.uid < 1 << 32 else 0,
            gid=info.gid if 0 <= info.gid < 1 << 32 else 0,
            mtime=min(max(int(info.mtime), 0), (1 << 32) - 1),
            target=info.linkname if info.issym() else "",
        )


@dataclass(slots=True, eq=False)
class _Node:
    """A name in the tree. `children` is None for everything but directories; `layer` is the one
    that last had this name, by itself."""

    inode: _Inode
    layer: int
    children: dict[str, _Node] | None = None


def merge_layers(
    layers: Sequence[LayerSource], out: BinaryIO, limits: Limits | None = None, *, at: str = ""
) -> None:
    """Writes what the layers, the lowest first, come to as a tar archive, below the directory
    `at`.

    Devices are left out (a guest has its own), as are extended attributes. Raises ImageError for
    a layer that is damaged, leads out of the image or is over the limits; OSError.
    """
    tree = _Tree(limits or Limits(), at)
    for number, layer in enumerate(layers):
        with layer.open() as stream:
            for ordinal, member in enumerate(members(stream, tree.bytes_left, layer.name)):
                tree.add(layer.name, number, ordinal, member.info)
    tree.name_inodes()
    with tarfile.open(
        fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, encoding="utf-8"
    ) as archive:
        for info in tree.without_content():
            archive.addfile(info)
        for number, layer in enumerate(layers):
            with layer.open() as stream:
                for ordinal, member in enumerate(members(stream, tree.limits.bytes, layer.name)):
                    _write(archive, tree.files.get((number, ordinal)), member)


def _write(archive: tarfile.TarFile, inode: _Inode | None, member: Member) -> None:
    """A file's content under the first of its names; the others are links to that."""
    if inode is None or member.content is None:
        return
    first, *others = inode.paths
    info = _header(first, inode)
    info.size = member.info.size
    archive.addfile(info, member.content)
    for path in others:
        link = _header(path, inode)
        link.type, link.linkname = tarfile.LNKTYPE, first
        archive.addfile(link)


def _header(path: str, inode: _Inode) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type = inode.kind
    info.mode, info.uid, info.gid, info.mtime = inode.mode, inode.uid, inode.gid, inode.mtime
    info.linkname = inode.target
    return info


class _Tree:
    """The names as they are after the layers read so far."""

    def __init__(self, limits: Limits, at: str) -> None:
        self.limits = limits
        self._at = at
        self.bytes_left = limits.bytes
        self.files: dict[tuple[int, int], _Inode] = {}
        self._entries = 0
        self._name_bytes = 0
        self._root = _Node(_Inode(-1, 0, tarfile.DIRTYPE), -1, {})

    # -- reading --------------------------------------------------------------------------

    def add(self, layer_name: str, layer: int, number: int, info: tarfile.TarInfo) -> None:
        """Takes in one member of a layer."""
        self.bytes_left -= info.size
        self._count(layer_name, len(info.linkname))
        parts = self._parts(layer_name, info.name)
        if not parts:
            return
        name = parts[-1]
        parent = self._directory(layer_name, layer, parts[:-1])
        if name == OPAQUE:
            self._prune(parent, layer)
        elif name.startswith(_AUFS):
            return
        elif name.startswith(WHITEOUT):
            self._white_out(layer_name, layer, parent, name.removeprefix(WHITEOUT))
        else:
            self._count(layer_name, len(name))
            self._put(layer_name, layer, parent, name, number, info)

    def _count(self, layer_name: str, name_bytes: int) -> None:
        """One more name that is held in memory, and what it takes."""
        self._entries += 1
        self._name_bytes += name_bytes
        if (
            self._entries > self.limits.entries
            or self._name_bytes > self.limits.name_bytes
            or self.bytes_left < 0
        ):
            raise ImageError(
                f"{layer_name}: the image is larger than an image may be ({self.limits.entries} "
                f"entries, {self.limits.name_bytes >> 20} MiB of names, "
                f"{self.limits.bytes >> 30} GiB); use a smaller one"
            )

    def _white_out(self, layer_name: str, layer: int, parent: _Node, name: str) -> None:
        if name in ("", ".", ".."):
            raise ImageError(f"{layer_name} has a whiteout of nothing; the image is damaged")
        assert parent.children is not None
        child = parent.children.get(name)
        if child is not None and self._prune(child, layer):
            del parent.children[name]

    def _prune(self, node: _Node, layer: int) -> bool:
        """Removes what lies below `node` from layers before `layer`; whether nothing is left that
        `node` itself should stay for."""
        # By hand and not by recursion: the tree is as deep as the limits allow.
        order = [node]
        for each in order:
            order += (each.children or {}).values()
        for each in reversed(order):
            if each.children:
                each.children = {
                    name: child
                    for name, child in each.children.items()
                    if child.layer == layer or child.children
                }
        return node.layer != layer and not node.children

    def _put(
        self,
        layer_name: str,
        layer: int,
        parent: _Node,
        name: str,
        number: int,
        info: tarfile.TarInfo,
    ) -> None:
        assert parent.children is not None
        inode = _Inode.of(layer, number, info)
        if info.isdir():
            old = parent.children.get(name)
            children = old.children if old is not None else None
            parent.children[name] = _Node(inode, layer, {} if children is None else children)
        elif info.islnk():
            target = self._find(layer_name, info.linkname)
            if target is None or target.children is not None:
                raise ImageError(
                    f"{layer_name}: {info.name!r} is a hard link to {info.linkname!r}, which is "
                    "no file of the image; the image is damaged"
                )
            parent.children[name] = _Node(target.inode, layer)
        elif info.isreg() or info.issym() or info.isfifo():
            if info.issym() and not 0 < len(_bytes(info.linkname)) < _PATH_BYTES:
                raise ImageError(f"{layer_name}: the link {info.name!r} leads nowhere")
            parent.children[name] = _Node(inode, layer)
        elif not info.isdev():
            raise ImageError(
                f"{layer_name}: {info.name!r} is of a kind images don't have ({info.type!r})"
            )

    # -- paths ----------------------------------------------------------------------------

    def _parts(self, layer_name: str, path: str) -> list[str]:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        wrong = None
        if ".." in parts:
            wrong = "leads out of the image"
        elif "\0" in path:
            wrong = "holds a zero"
        elif len(parts) > self.limits.depth or len(_bytes(path)) >= _PATH_BYTES:
            wrong = "is too long or too deep"
        elif any(len(_bytes(part)) > _NAME_BYTES for part in parts):
            wrong = "has too long a name"
        if wrong:
            raise ImageError(f"{layer_name}: the path {path[:200]!r} {wrong}; it is not unpacked")
        return parts

    def _directory(self, layer_name: str, layer: int, parts: list[str]) -> _Node:
        """The directory at `parts`, made where there is none. Links on the way are followed
        inside the tree, as they would be in the guest."""
        node = self._walk(layer_name, parts, layer)
        if node is None or node.children is None:
            raise ImageError(
                f"{layer_name}: {'/'.join(parts)[:200]!r} is used as a directory and is none; the "
                "image is damaged"
            )
        return node

    def _find(self, layer_name: str, path: str) -> _Node | None:
        """What a hard link's target names; a link at its end is not followed."""
        parts = self._parts(layer_name, path)
        if not parts:
            return None
        parent = self._walk(layer_name, parts[:-1], None)
        return parent.children.get(parts[-1]) if parent and parent.children else None

    def _walk(self, layer_name: str, parts: Sequence[str], layer: int | None) -> _Node | None:
        """Follows a path of directories; with a `layer`, makes those that are not there."""
        trail = [self._root]
        rest = list(reversed(parts))
        links = 0
        while rest:
            part = rest.pop()
            if part == "..":
                # Only a symbolic link has these; at the root they stay there.
                del trail[1 if len(trail) == 1 else -1 :]
                continue
            children = trail[-1].children
            if children is None:
                return None
            node = children.get(part)
            if node is None:
                if layer is None:
                    return None
                if len(trail) > self.limits.depth:
                    raise ImageError(f"{layer_name}: directories lie too deep in it")
                self._count(layer_name, len(part))
                node = _Node(_Inode(layer, -1, tarfile.DIRTYPE), layer, {})
                children[part] = node
            if node.inode.kind == tarfile.SYMTYPE:
                links += 1
                if links > MAX_SYMLINKS:
                    raise ImageError(f"{layer_name}: links lead in a circle at {part[:200]!r}")
                target = node.inode.target
                if target.startswith("/"):
                    trail = [self._root]
                rest += [p for p in reversed(target.split("/")) if p not in ("", ".")]
                continue
            trail.append(node)
        return trail[-1]

    # -- writing --------------------------------------------------------------------------

    def name_inodes(self) -> None:
        """Tells every file its names, and puts the files in `files`."""
        for path, node in self._all():
            if node.inode.kind == tarfile.REGTYPE:
                node.inode.paths.append(path)
                self.files[node.inode.layer, node.inode.number] = node.inode

    def without_content(self) -> Iterator[tarfile.TarInfo]:
        """The headers of everything but files, directories before what they hold."""
        for folder in reversed(PurePosixPath(self._at).parents[:-1]):
            yield _header(os.fspath(folder), self._root.inode)
        for path, node in self._all():
            if node.inode.kind != tarfile.REGTYPE:
                yield _header(path, node.inode)

    def _all(self) -> Iterator[tuple[str, _Node]]:
        """Every name with its path, sorted, directories first."""
        rest = [(self._at, self._root)]
        while rest:
            path, node = rest.pop()
            if path:
                yield path, node
            below = sorted((node.children or {}).items(), reverse=True)
            prefix = f"{path}/" if path else ""
            rest += [(prefix + name, child) for name, child in below]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
