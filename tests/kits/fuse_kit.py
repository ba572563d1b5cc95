"""A guest kernel's side of FUSE: requests by hand, answers as values or as OSError."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from voidbus.vm.devices.fuse_messages import ROOT_NODE, Attributes, Opcode
from voidbus.vm.devices.fuse_server import FLAGS, FuseServer
from voidbus.vm.devices.shared_directory import SharedDirectory
from voidbus.vm.devices.virtqueue import Chain

MODE, UID, GID, SIZE, ATIME, MTIME, FH = 1, 2, 4, 8, 16, 32, 64
ATIME_NOW, MTIME_NOW = 128, 256
"""FATTR_ bits."""

_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")


class Found(NamedTuple):
    """An entry reply."""

    node: int
    attributes: Attributes


def by_hand(server: FuseServer) -> Callable[[list[bytes], int], bytes]:
    """Carries requests straight into a server, no queue between."""

    def send(readable: list[bytes], room: int) -> bytes:
        chain = Chain(0)
        answer = bytearray(room)
        chain.readable = [memoryview(part) for part in readable]
        chain.readable_bytes = sum(map(len, readable))
        # In two pieces, so that what is written crosses from one to the next.
        chain.writable = [memoryview(answer)[: room // 3], memoryview(answer)[room // 3 :]]
        chain.writable_bytes = room
        return bytes(answer[: server.serve(chain)])

    return send


class FuseClient:
    """``send`` carries a request (in pieces) with room for an answer, and returns the answer."""

    def __init__(self, send: Callable[[list[bytes], int], bytes]) -> None:
        self.send = send
        self._unique = itertools.count(2)

    # -- any request ----------------------------------------------------------------------

    def raw(
        self, opcode: int, node: int, body: bytes = b"", *, data: bytes = b"", room: int = 4096
    ) -> bytes | None:
        """The answer's body; OSError for an error; None for no answer."""
        unique = next(self._unique)
        length = 40 + len(body) + len(data)
        header = struct.pack("<IIQQIIIHH", length, opcode, unique, node, 0, 0, 1, 0, 0)
        answer = self.send([header, body, data], room)
        if not answer:
            return None
        size, error, answered = struct.unpack_from("<IiQ", answer)
        assert (size, answered) == (len(answer), unique)
        if error:
            assert size == 16
            raise OSError(-error, f"operation {opcode}: {os.strerror(-error)}")
        return answer[16:]

    def ask(
        self, opcode: int, node: int, body: bytes = b"", *, data: bytes = b"", room: int = 4096
    ) -> bytes:
        answer = self.raw(opcode, node, body, data=data, room=room)
        assert answer is not None
        return answer

    # -- the session ----------------------------------------------------------------------

    def init(self, major: int = 7, minor: int = 37, flags: int = 0xFFFFFFFF) -> tuple[int, ...]:
        body = struct.pack("<IIII48x", major, minor, 1 << 17, flags)
        return struct.unpack_from("<IIIIHHIIHH", self.ask(Opcode.INIT, 0, body))

    def forget(self, node: int, lookups: int = 1) -> None:
        assert self.raw(Opcode.FORGET, node, struct.pack("<Q", lookups), room=0) is None

    def batch_forget(self, *ones: tuple[int, int]) -> None:
        body = struct.pack("<I4x", len(ones)) + b"".join(struct.pack("<QQ", *one) for one in ones)
        assert self.raw(Opcode.BATCH_FORGET, 0, body, room=0) is None

    # -- names ----------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Found:
        return entry(self.ask(Opcode.LOOKUP, parent, name + b"\0"))

    def walk(self, path: str) -> Found:
        """The file at a path below the root, looked up name by name."""
        node = ROOT_NODE
        found = Found(node, self.getattr(node))
        for name in path.split("/"):
            found = self.lookup(node, name.encode())
            node = found.node
        return found

    def mkdir(self, parent: int, name: bytes, mode: int = 0o755) -> Found:
        body = struct.pack("<II", mode, 0) + name + b"\0"
        return entry(self.ask(Opcode.MKDIR, parent, body))

    def mknod(self, parent: int, name: bytes, mode: int, device: int = 0) -> Found:
        body = struct.pack("<IIII", mode, device, 0, 0) + name + b"\0"
        return entry(self.ask(Opcode.MKNOD, parent, body))

    def symlink(self, parent: int, name: bytes, target: bytes) -> Found:
        return entry(self.ask(Opcode.SYMLINK, parent, name + b"\0" + target + b"\0"))

    def link(self, node: int, parent: int, name: bytes) -> Found:
        return entry(self.ask(Opcode.LINK, parent, struct.pack("<Q", node) + name + b"\0"))

    def readlink(self, node: int) -> bytes:
        return self.ask(Opcode.READLINK, node)

    def unlink(self, parent: int, name: bytes) -> None:
        self.ask(Opcode.UNLINK, parent, name + b"\0")

    def rmdir(self, parent: int, name: bytes) -> None:
        self.ask(Opcode.RMDIR, parent, name + b"\0")

    def rename(
        self, parent: int, name: bytes, target: int, new: bytes, flags: int | None = None
    ) -> None:
        names = name + b"\0" + new + b"\0"
        if flags is None:
            self.ask(Opcode.RENAME, parent, struct.pack("<Q", target) + names)
        else:
            self.ask(Opcode.RENAME2, parent, struct.pack("<QII", target, flags, 0) + names)

    # -- attributes -----------------------------------------------------------------------

    def getattr(self, node: int) -> Attributes:
        return attributes(self.ask(Opcode.GETATTR, node, struct.pack("<IIQ", 0, 0, 0)), 16)

    def setattr(self, node: int, valid: int, **fields: int) -> Attributes:
        names = (
            *("handle", "size", "owner", "atime", "mtime", "ctime"),
            *("atime_ns", "mtime_ns", "ctime_ns", "mode", "unused4", "uid", "gid", "unused5"),
        )
        values = [fields.get(name, 0) for name in names]
        body = struct.pack("<II6Q8I", valid, 0, *(value & (1 << 64) - 1 for value in values))
        return attributes(self.ask(Opcode.SETATTR, node, body), 16)

    def access(self, node: int, mask: int) -> None:
        self.ask(Opcode.ACCESS, node, struct.pack("<II", mask, 0))

    # -- files ----------------------------------------------------------------------------

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        answer = self.ask(Opcode.OPEN, node, struct.pack("<II", flags, 0))
        return int(struct.unpack_from("<Q", answer)[0])

    def create(
        self, parent: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644
    ) -> tuple[Found, int]:
        body = struct.pack("<IIII", flags | os.O_CREAT, mode, 0, 0) + name + b"\0"
        answer = self.ask(Opcode.CREATE, parent, body)
        return entry(answer[:-16]), int(struct.unpack_from("<Q", answer, len(answer) - 16)[0])

    def read(self, node: int, handle: int, offset: int = 0, size: int = 4096) -> bytes:
        body = struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)
        return self.ask(Opcode.READ, node, body, room=16 + size)

    def write(self, node: int, handle: int, data: bytes, offset: int = 0) -> int:
        body = struct.pack("<QQIIQII", handle, offset, len(data), 0, 0, 0, 0)
        answer = self.ask(Opcode.WRITE, node, body, data=data)
        return int(struct.unpack_from("<I", answer)[0])

    def release(self, node: int, handle: int) -> None:
        self.ask(Opcode.RELEASE, node, struct.pack("<QIIQ", handle, 0, 0, 0))

    def fsync(self, node: int, handle: int, flags: int = 0, *, opcode: int = Opcode.FSYNC) -> None:
        self.ask(opcode, node, struct.pack("<QII", handle, flags, 0))

    def seek(self, node: int, handle: int, offset: int, whence: int) -> int:
        body = struct.pack("<QQII", handle, offset, whence, 0)
        return int(struct.unpack("<Q", self.ask(Opcode.LSEEK, node, body))[0])

    def fallocate(self, node: int, handle: int, mode: int, offset: int, length: int) -> None:
        body = struct.pack("<QQQII", handle, offset, length, mode, 0)
        self.ask(Opcode.FALLOCATE, node, body)

    def copy(
        self, source: tuple[int, int], at: int, target: tuple[int, int], to: int, length: int
    ) -> int:
        """``source`` and ``target`` are node and handle."""
        body = struct.pack("<QQQQQQQ", source[1], at, target[0], target[1], to, length, 0)
        answer = self.ask(Opcode.COPY_FILE_RANGE, source[0], body)
        return int(struct.unpack_from("<I", answer)[0])

    # -- directories ----------------------------------------------------------------------

    def opendir(self, node: int) -> int:
        answer = self.ask(Opcode.OPENDIR, node, struct.pack("<II", 0, 0))
        return int(struct.unpack_from("<Q", answer)[0])

    def releasedir(self, node: int, handle: int) -> None:
        self.ask(Opcode.RELEASEDIR, node, struct.pack("<QIIQ", handle, 0, 0, 0))

    def readdir(self, node: int, handle: int, offset: int = 0, size: int = 4096) -> bytes:
        body = struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)
        return self.ask(Opcode.READDIR, node, body, room=16 + size)

    def readdirplus(self, node: int, handle: int, offset: int = 0, size: int = 4096) -> bytes:
        body = struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)
        return self.ask(Opcode.READDIRPLUS, node, body, room=16 + size)

    def names(self, node: int, size: int = 4096) -> list[bytes]:
        """All names in a directory but . and .. , in its order."""
        handle = self.opendir(node)
        names: list[bytes] = []
        offset = 0
        while listed := dirents(self.readdir(node, handle, offset, size)):
            names += [name for _, _, name in listed]
            offset = listed[-1][1]
        self.releasedir(node, handle)
        return [name for name in names if name not in (b".", b"..")]

    # -- whole files ----------------------------------------------------------------------

    def content(self, node: int) -> bytes:
        handle = self.open(node)
        try:
            return self.read(node, handle, 0, 65536)
        finally:
            self.release(node, handle)

    def put(self, parent: int, name: bytes, data: bytes) -> int:
        """Make (or replace the content of) a file; its node."""
        found, handle = self.create(parent, name, os.O_RDWR | os.O_TRUNC)
        assert self.write(found.node, handle, data) == len(data)
        self.release(found.node, handle)
        return found.node


def attributes(answer: bytes, offset: int) -> Attributes:
    fields = _ATTR.unpack_from(answer, offset)
    inode, size, blocks, atime, mtime, ctime, a_ns, m_ns, c_ns, mode, links, uid, gid = fields[:13]
    assert fields[13] == 0, "a device number"
    seconds = [value - (1 << 64) if value >> 63 else value for value in (atime, mtime, ctime)]
    parts = zip(seconds, (a_ns, m_ns, c_ns), strict=True)
    atime, mtime, ctime = (whole * 10**9 + part for whole, part in parts)
    return Attributes(inode, size, blocks, atime, mtime, ctime, mode, links, uid, gid, fields[14])


def entry(answer: bytes) -> Found:
    assert len(answer) == 128
    node, generation, entry_valid, attr_valid = struct.unpack_from("<QQQQ", answer)
    assert (generation, entry_valid, attr_valid) == (0, 1, 1)
    return Found(node, attributes(answer, 40))


def dirents(answer: bytes, *, plus: bool = False) -> list[tuple[int, int, bytes]]:
    """Inode (with ``plus`` the node), the next offset, and the name of each entry."""
    listed = []
    while answer:
        node = struct.unpack_from("<Q", answer)[0]
        answer = answer[128:] if plus else answer
        inode, offset, length, _ = struct.unpack_from("<QQII", answer)
        listed.append((node if plus else inode, offset, answer[24 : 24 + length]))
        answer = answer[(24 + length + 7) & ~7 :]
    return listed


def client_of(share: SharedDirectory) -> FuseClient:
    """A guest that has begun its session with a share."""
    client = FuseClient(by_hand(FuseServer(share)))
    answer = client.init()
    assert answer[:2] == (7, 31)
    assert answer[3] == FLAGS
    return client


def errno_of(call: Callable[..., object], *arguments: object, **named: object) -> str:
    """The name of the error a call ends with, or "" if it succeeds."""
    try:
        call(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
