"""The files a guest knows of a shared directory, and how each is reached again.

A file is reached one name at a time, each relative to the opened directory before and without
following links, and it counts only if it is the one the guest was told of (device and inode
number). So nothing a guest or anyone on the host does to names leads out of the share.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import stat
from collections import OrderedDict
from dataclasses import dataclass

from voidbus.vm.devices.fuse_messages import ROOT_NODE

NODES_LIMIT = 65536
"""Files a guest may know at a time, some 600 bytes each. Past it the one unused for longest is
forgotten, which the guest notices as ESTALE and mends by looking it up again."""

_REACH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_EVICTION_TRIES = 64
_SPARE_DESCRIPTORS = 8


@dataclass(frozen=True)
class ShareLimits:
    """What one share may hold."""

    nodes: int = NODES_LIMIT
    """Files known."""
    descriptors: int = 64
    """Descriptors kept to reach files quickly, beside those of open files. 8 at least."""
    handles: int = 128
    """Files and directories open at a time; one more is ENFILE."""

    @classmethod
    def of_process(cls, shares: int = 1) -> ShareLimits:
        """Limits of each of so many shares: together they have half of the descriptors that this
        process may have (RLIMIT_NOFILE), as long as each has a few."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft == resource.RLIM_INFINITY:
            soft = 1 << 20
        each = soft // 2 // max(1, shares)
        return cls(
            descriptors=max(_SPARE_DESCRIPTORS, min(each // 3, 1024)),
            handles=max(16, min(each * 2 // 3, 4096)),
        )


class Node:
    """A file the guest knows by a number."""

    __slots__ = (
        "children",
        "descriptor",
        "kind",
        "lookups",
        "name",
        "number",
        "open",
        "parent",
        "place",
    )

    def __init__(
        self, number: int, parent: Node | None, name: bytes, found: os.stat_result
    ) -> None:
        self.number = number
        self.parent = parent
        """The directory it was last found in; None for the root, and for what has no name."""
        self.name = name
        self.place = (found.st_dev, found.st_ino)
        """What it is on the host: device and inode number."""
        self.kind = stat.S_IFMT(found.st_mode)
        self.lookups = 0
        """How often the guest was told of it and has not yet forgotten it."""
        self.children = 0
        """Nodes whose parent this is."""
        self.open: list[int] = []
        """Descriptors of its open handles."""
        self.descriptor: int | None = None
        """An O_PATH descriptor, while one is kept."""

    @property
    def held(self) -> bool:
        """Whether a descriptor holds it, so that its inode number can't be another file's."""
        return self.descriptor is not None or bool(self.open)


class NodeTable:
    """All nodes of one share. Not for several threads."""

    def __init__(self, root: int, limits: ShareLimits) -> None:
        """``root`` is an O_PATH descriptor of the shared directory, owned from now on."""
        self._limits = limits
        self._next = ROOT_NODE + 1
        self._root = Node(ROOT_NODE, None, b"", os.fstat(root))
        self._root.descriptor = root
        # Nodes by number, the one unused for longest first; and by device and inode number.
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._places: dict[tuple[int, int], Node] = {self._root.place: self._root}
        # Nodes other than the root with a descriptor, the one unused for longest first.
        self._reached: OrderedDict[int, Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def root(self) -> Node:
        """The shared directory itself."""
        return self._root

    def get(self, number: int) -> Node:
        """OSError (ESTALE) for a number that is not known, or no longer."""
        if number == ROOT_NODE:
            return self._root
        node = self._nodes.get(number)
        if node is None:
            raise OSError(errno.ESTALE, "no such node")
        self._nodes.move_to_end(number)
        return node

    def stat(self, node: Node) -> os.stat_result:
        """What the host says of the node now. OSError (ESTALE) as for ``descriptor``."""
        if node.held or node.parent is None:
            return os.fstat(self.descriptor(node))
        directory = self.descriptor(node.parent)
        try:
            found = os.stat(node.name, dir_fd=directory, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            raise OSError(errno.ESTALE, "the file is no longer there") from None
        return _same(node, found)

    # -- reaching -------------------------------------------------------------------------

    def descriptor(self, node: Node) -> int:
        """A descriptor of the node: good for paths relative to it, for stat, and for reopening by
        /proc/self/fd. It stays open at least while no more than two others are asked for.
        OSError (ESTALE) if the node is no longer where it was."""
        if node.open:
            return node.open[0]
        if node is self._root:
            return _present(node.descriptor)
        if node.descriptor is None:
            self._reach(node)
        else:
            self._reached.move_to_end(node.number)
        return _present(node.descriptor)

    def _reach(self, node: Node) -> None:
        # The names from the nearest directory that is at hand. The count bounds a walk in records
        # that have become a circle because the host moved directories about.
        way = [node]
        while not (base := _parent_of(way[-1])).held:
            if len(way) > len(self._nodes):
                raise OSError(errno.ESTALE, "the directory was moved on the host")
            way.append(base)
        at = base.open[0] if base.open else _present(base.descriptor)
        # The node and its directory are kept; what is above them only leads there.
        opened: list[int] = []
        try:
            for step in reversed(way):
                at = _open_same(at, step)
                opened.append(at)
                if len(opened) > 2:
                    os.close(opened.pop(0))
        except BaseException:
            for descriptor in opened:
                os.close(descriptor)
            raise
        for step, descriptor in zip(way[1::-1], opened, strict=True):
            self.keep(step, descriptor)

    def keep(self, node: Node, descriptor: int) -> None:
        """Own ``descriptor``, an O_PATH one of this node, and use it while there is room."""
        if node.descriptor is not None:
            os.close(descriptor)
            return
        node.descriptor = descriptor
        self._reached[node.number] = node
        while len(self._reached) > max(self._limits.descriptors, _SPARE_DESCRIPTORS):
            self._release(self._reached.popitem(last=False)[1])

    def _release(self, node: Node) -> None:
        self._reached.pop(node.number, None)
        if node.descriptor is not None:
            os.close(node.descriptor)
            node.descriptor = None

    # -- the guest is told of a file ------------------------------------------------------

    def found(self, parent: Node, name: bytes, what: os.stat_result) -> Node:
        """The node for what ``name`` is in ``parent``; the guest has one lookup more of it.

        A node known by these numbers is taken for the same file if it is still held, still has its
        name, or has several. Else the host may have given a new file the inode number of one that
        is gone, and it gets a node of its own. OSError (ENFILE) when there is no room.
        """
        node = self._places.get((what.st_dev, what.st_ino))
        if node is not None and not self._is_same(node, parent, name, what):
            node = None
        if node is None:
            node = self._add(parent, name, what)
        elif node.kind != stat.S_IFDIR:
            self._put(node, parent, name)
        node.lookups += 1
        return node

    def _is_same(self, node: Node, parent: Node, name: bytes, what: os.stat_result) -> bool:
        if node.kind != stat.S_IFMT(what.st_mode):
            return False
        if node.parent is parent and node.name == name:
            return True
        if node.kind == stat.S_IFDIR:
            return False  # Moved on the host. Moving our record too could make a circle of records.
        return node.held or what.st_nlink > 1

    def _add(self, parent: Node, name: bytes, what: os.stat_result) -> Node:
        if len(self._nodes) >= self._limits.nodes:
            self._evict(parent)
        node = Node(self._next, parent, name, what)
        self._next += 1
        parent.children += 1
        self._nodes[node.number] = node
        self._places[node.place] = node
        return node

    def _evict(self, needed: Node) -> None:
        for number in list(itertools.islice(self._nodes, _EVICTION_TRIES)):
            node = self._nodes[number]
            if node.children == 0 and not node.open and node is not needed:
                former = node.parent
                self._drop(node)
                if former is not None:
                    self.settle(former)
                return
            self._nodes.move_to_end(number)
        raise OSError(errno.ENFILE, "too many files known to the guest")

    def forget(self, number: int, lookups: int) -> None:
        """The guest has forgotten ``lookups`` of what it was told. Unknown numbers are let be:
        what was forgotten here first may come."""
        node = self._nodes.get(number)
        if node is not None:
            node.lookups = max(0, node.lookups - lookups)
            self.settle(node)

    def settle(self, node: Node) -> None:
        """Drop a node nobody needs any more, and then its directory, if that is one too."""
        above: Node | None = node
        while (
            above is not None
            and above is not self._root
            and above.lookups == 0
            and above.children == 0
            and not above.open
            and above.number in self._nodes
        ):
            parent = above.parent
            self._drop(above)
            above = parent

    def _drop(self, node: Node) -> None:
        self._release(node)
        del self._nodes[node.number]
        if self._places.get(node.place) is node:
            del self._places[node.place]
        self._take_out(node)

    # -- the guest changes names ----------------------------------------------------------

    def at(self, what: os.stat_result) -> Node | None:
        """The node of a file, if the guest knows it."""
        return self._places.get((what.st_dev, what.st_ino))

    def moved(self, node: Node, parent: Node, name: bytes) -> None:
        """The guest has given the node this name."""
        if node is self._root:
            return
        if node.kind == stat.S_IFDIR and self._is_above(node, parent):
            self._lose_name(node)
        else:
            self._put(node, parent, name)

    def removed(self, node: Node, *, last: bool) -> None:
        """A name of the node was removed; with ``last`` it was the only one, so that its inode
        number may soon be another file's. An open file goes on without a name."""
        if node is self._root:
            return
        if last:
            if self._places.get(node.place) is node:
                del self._places[node.place]
            self._lose_name(node)

    def _is_above(self, node: Node, below: Node) -> bool:
        at: Node | None = below
        for _ in range(len(self._nodes) + 1):
            if at is None:
                return False
            if at is node:
                return True
            at = at.parent
        return True

    def _put(self, node: Node, parent: Node, name: bytes) -> None:
        if node.parent is not parent:
            parent.children += 1
            former = node.parent
            node.parent = parent
            if former is not None:
                former.children -= 1
                self.settle(former)
        node.name = name

    def _take_out(self, node: Node) -> None:
        if node.parent is not None:
            node.parent.children -= 1
            node.parent = None

    def _lose_name(self, node: Node) -> None:
        former = node.parent
        self._take_out(node)
        if former is not None:
            self.settle(former)

    # -- the end --------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all but the root. Open handles are to be closed before."""
        for node in list(self._reached.values()):
            self._release(node)
        self._nodes.clear()
        self._places = {self._root.place: self._root}
        self._root.children = 0

    def close(self) -> None:
        """Close every descriptor, the root's too. Again is fine."""
        self.clear()
        if self._root.descriptor is not None:
            os.close(self._root.descriptor)
            self._root.descriptor = None


def _parent_of(node: Node) -> Node:
    if node.parent is None:
        raise OSError(errno.ESTALE, "the file has no name any more")
    return node.parent


def _open_same(directory: int, node: Node) -> int:
    try:
        descriptor = os.open(node.name, _REACH, dir_fd=directory)
    except (FileNotFoundError, NotADirectoryError):
        raise OSError(errno.ESTALE, "the file is no longer there") from None
    try:
        _same(node, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _same(node: Node, found: os.stat_result) -> os.stat_result:
    if (found.st_dev, found.st_ino) != node.place or stat.S_IFMT(found.st_mode) != node.kind:
        raise OSError(errno.ESTALE, "another file has its name")
    return found


def _present(descriptor: int | None) -> int:
    if descriptor is None:
        raise OSError(errno.EBADF, "the share is closed")
    return descriptor
