"""A share does what a dict would: random operations compared with a model of a directory."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from fuse_kit import FuseClient, client_of, errno_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from voidbus.vm.devices.fuse_messages import ROOT_NODE
from voidbus.vm.devices.share_nodes import ShareLimits
from voidbus.vm.devices.shared_directory import SharedDirectory

NAMES = st.sampled_from(("a", "b", "c", "d"))
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
Path_ = tuple[str, ...]


class ShareMachine(RuleBasedStateMachine):
    """The model: directories are dicts, files are bytearrays, which hard links share."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        # Few of everything, so that nodes are forgotten and reached again all the time.
        limits = ShareLimits(nodes=40, descriptors=8, handles=4)
        self.share = SharedDirectory(self.folder, writable=True, limits=limits)
        self.guest: FuseClient = client_of(self.share)
        self.root: dict[str, object] = {}
        self.opened: list[tuple[int, int, bytearray]] = []

    def teardown(self) -> None:
        self.share.close()
        shutil.rmtree(self.folder)

    # -- the model ------------------------------------------------------------------------

    def at(self, path: Path_) -> object:
        """What the model has there, or None."""
        found: object = self.root
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def parent(self, path: Path_) -> dict[str, object] | None:
        found = self.at(path[:-1])
        return found if isinstance(found, dict) else None

    def node(self, path: Path_) -> int:
        node = ROOT_NODE
        for name in path:
            node = self.guest.lookup(node, name.encode()).node
        return node

    # -- rules ----------------------------------------------------------------------------

    @rule(path=PATHS, data=st.binary(max_size=20))
    def put(self, path: Path_, data: bytes) -> None:
        parent, there = self.parent(path), self.at(path)
        if parent is None or len(self.opened) >= 4:
            return
        within, name = self.node(path[:-1]), path[-1].encode()
        if isinstance(there, dict):
            assert errno_of(self.guest.create, within, name) == "EISDIR"
            return
        self.guest.put(within, name, data)
        if isinstance(there, bytearray):
            there[:] = data
        else:
            parent[path[-1]] = bytearray(data)

    @rule(path=PATHS)
    def make_directory(self, path: Path_) -> None:
        parent = self.parent(path)
        if parent is None:
            return
        within, name = self.node(path[:-1]), path[-1].encode()
        if path[-1] in parent:
            assert errno_of(self.guest.mkdir, within, name) == "EEXIST"
        else:
            self.guest.mkdir(within, name)
            parent[path[-1]] = {}

    @rule(path=PATHS)
    def remove(self, path: Path_) -> None:
        parent, there = self.parent(path), self.at(path)
        if parent is None:
            return
        within, name = self.node(path[:-1]), path[-1].encode()
        if there is None:
            assert errno_of(self.guest.unlink, within, name) == "ENOENT"
            assert errno_of(self.guest.rmdir, within, name) == "ENOENT"
        elif isinstance(there, dict):
            assert errno_of(self.guest.unlink, within, name) in ("EISDIR", "EPERM")
            expected = "ENOTEMPTY" if there else ""
            assert errno_of(self.guest.rmdir, within, name) == expected
            if not there:
                del parent[path[-1]]
        else:
            assert errno_of(self.guest.rmdir, within, name) == "ENOTDIR"
            self.guest.unlink(within, name)
            del parent[path[-1]]

    @rule(path=PATHS, to=PATHS, flags=st.sampled_from((None, 0, 1, 2)))
    def rename(self, path: Path_, to: Path_, flags: int | None) -> None:
        parent, new_parent = self.parent(path), self.parent(to)
        moving, there = self.at(path), self.at(to)
        if parent is None or new_parent is None:
            return
        expected = self.refusal(path, to, flags or 0)
        within, new_within = self.node(path[:-1]), self.node(to[:-1])
        names = path[-1].encode(), to[-1].encode()
        refused = errno_of(self.guest.rename, within, names[0], new_within, names[1], flags)
        assert bool(refused) == expected, refused
        if expected or moving is there:
            return
        new_parent[to[-1]] = moving
        if flags == 2:
            parent[path[-1]] = there
        else:
            del parent[path[-1]]

    def refusal(self, path: Path_, target: Path_, flags: int) -> bool:
        """Whether a rename has to fail (rename(2))."""
        moving, there = self.at(path), self.at(target)
        if moving is None:
            return True
        into_itself = isinstance(moving, dict) and target != path and target[: len(path)] == path
        onto_above = isinstance(there, dict) and path != target and path[: len(target)] == target
        if flags == 1:
            return there is not None or into_itself
        if flags == 2:
            return there is None or into_itself or onto_above
        if path == target or moving is there:
            return False
        unlike = there is not None and isinstance(moving, dict) != isinstance(there, dict)
        return into_itself or onto_above or unlike or (isinstance(there, dict) and bool(there))

    @rule(path=PATHS, to=PATHS)
    def link(self, path: Path_, to: Path_) -> None:
        there, new_parent = self.at(path), self.parent(to)
        if new_parent is None or not isinstance(there, bytearray):
            return
        node, within, name = self.node(path), self.node(to[:-1]), to[-1].encode()
        if to[-1] in new_parent:
            assert errno_of(self.guest.link, node, within, name) == "EEXIST"
        else:
            self.guest.link(node, within, name)
            new_parent[to[-1]] = there

    @rule(path=PATHS)
    def open(self, path: Path_) -> None:
        there = self.at(path)
        if not isinstance(there, bytearray):
            return
        node = self.node(path)
        if len(self.opened) == 4:
            assert errno_of(self.guest.open, node) == "ENFILE"
        else:
            self.opened.append((node, self.guest.open(node, os.O_RDWR), there))

    @precondition(lambda self: self.opened)
    @rule(data=st.binary(max_size=20), offset=st.integers(0, 40), which=st.integers(0, 3))
    def write(self, data: bytes, offset: int, which: int) -> None:
        node, handle, content = self.opened[which % len(self.opened)]
        assert self.guest.write(node, handle, data, offset) == len(data)
        if data:
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
        assert self.guest.read(node, handle) == content
        assert self.guest.getattr(node).size == len(content)

    @precondition(lambda self: self.opened)
    @rule(which=st.integers(0, 3))
    def close(self, which: int) -> None:
        node, handle, _ = self.opened.pop(which % len(self.opened))
        self.guest.release(node, handle)

    @rule(path=PATHS)
    def read(self, path: Path_) -> None:
        there = self.at(path)
        if isinstance(there, dict):
            listed = (
                [name.decode() for name in self.guest.names(self.node(path))]
                if len(self.opened) < 4
                else sorted(there)
            )
            assert sorted(listed) == sorted(there)
        elif isinstance(there, bytearray) and len(self.opened) < 4:
            assert self.guest.content(self.node(path)) == there
        elif there is None and self.parent(path) is not None:
            within = self.node(path[:-1])
            assert errno_of(self.guest.lookup, within, path[-1].encode()) == "ENOENT"

    @invariant()
    def the_host_has_the_same(self) -> None:
        assert self.on_host(self.folder) == self.root
        assert len(self.share.files) == len(self.opened)

    def on_host(self, folder: Path) -> dict[str, object]:
        return {
            path.name: self.on_host(path)
            if stat.S_ISDIR(path.lstat().st_mode)
            else bytearray(path.read_bytes())
            for path in folder.iterdir()
        }


TestShare = ShareMachine.TestCase
TestShare.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
