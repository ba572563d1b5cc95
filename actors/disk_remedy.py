"""What an operator does about a disk that can't be written."""

from __future__ import annotations

import errno


def disk_remedy(error: OSError) -> str:
    """The remedy for the state directory's disk, to stand behind the error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space there"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable for this user"
    return "look at the disk"
