"""The one thing about a squashfs that `sqfstar` can't be told: the time of its topmost directory.

sqfstar 4.5 takes the time of day for it, whatever `-root-time` says, so no two layers would be the
same bytes. The format is the kernel's (fs/squashfs/squashfs_fs.h).
"""

from __future__ import annotations

import struct
from pathlib import Path

from voidbus.vm.image.fault import ImageError

_MAGIC = 0x73717368
_SUPER_BLOCK = struct.Struct("<I 28x Q 24x Q")
"""s_magic; at 32 root_inode, the place of its block in the table and its place in the block; at 64
inode_table_start."""

_BLOCK_BYTES = 8192
_BLOCK_HEADER = struct.Struct("<H")
_UNCOMPRESSED = 0x8000

_INODE = struct.Struct("<HHHHI")
"""What all inodes begin with: inode_type, mode, uid, guid, mtime."""
_DIRECTORIES = (1, 8)


def set_root_time(path: Path, seconds: int) -> None:
    """Set the time of the topmost directory of a squashfs whose inodes are not compressed
    (`-noI`), in seconds since 1970. Raises ImageError (it is no such file), OSError."""
    with path.open("r+b", buffering=0) as file:
        head = file.read(_SUPER_BLOCK.size)
        if len(head) < _SUPER_BLOCK.size:
            raise _damaged(path)
        magic, root, table = _SUPER_BLOCK.unpack(head)
        block, offset = table + (root >> 16), root & 0xFFFF
        file.seek(block)
        header = file.read(_BLOCK_HEADER.size)
        if magic != _MAGIC or len(header) < _BLOCK_HEADER.size:
            raise _damaged(path)
        if not _BLOCK_HEADER.unpack(header)[0] & _UNCOMPRESSED:
            raise ImageError(f"the layer {path} has compressed inodes, so its time can't be set")
        # An inode may begin in one block and end in the next, each with a header before it.
        places = [
            block + at // _BLOCK_BYTES * (_BLOCK_HEADER.size + _BLOCK_BYTES)
            + _BLOCK_HEADER.size + at % _BLOCK_BYTES
            for at in range(offset, offset + _INODE.size)
        ]  # fmt: skip
        inode = bytearray()
        for place in places:
            file.seek(place)
            inode += file.read(1)
        if len(inode) < _INODE.size or _INODE.unpack(inode)[0] not in _DIRECTORIES:
            raise _damaged(path)
        _INODE.pack_into(inode, 0, *_INODE.unpack(inode)[:4], seconds)
        for place, value in zip(places, inode, strict=True):
            file.seek(place)
            file.write(bytes([value]))


def _damaged(path: Path) -> ImageError:
    return ImageError(f"{path} is not the squashfs it should be; check the space on its disk")
