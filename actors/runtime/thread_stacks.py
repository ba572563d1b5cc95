"""How much stack the threads of a process have."""

from __future__ import annotations

import ctypes
import threading

_ATTRIBUTES_BYTES = 64  # of a pthread_attr_t: 56 (sysdeps/x86/nptl/bits/pthreadtypes-arch.h)


def limit_thread_stacks(size: int) -> None:
    """Give threads started from here on `size` bytes of stack: Python's, and with glibc those of
    its libraries too (pthread_setattr_default_np(3)). Raises ValueError, OSError."""
    threading.stack_size(size)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "pthread_setattr_default_np"):
        return
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    failed = (
        libc.pthread_attr_init(attributes)
        or libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(size))
        or libc.pthread_setattr_default_np(attributes)
    )
    if failed:
        raise OSError(failed, "the default stack of threads could not be set")
