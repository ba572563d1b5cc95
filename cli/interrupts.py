"""Ctrl-C while a command is being imported, and after that.

An interrupt that is raised in the middle of an import may be lost, or come out as something else:
weak references' callbacks print and forget it, and pydantic, while it builds a model, makes a
SchemaError of it. Nothing that is imported needs cleaning up, so the process ends there and then.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

_LINE = b"voidbus: interrupted\n"
_raised = False


def end_at_once() -> None:
    """Let Ctrl-C end the process with a line and 130. One that is ignored, as by nohup(1), is."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt: there may be something to clean up from now on."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _raise)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """As `end_at_once`, for what a command imports before it starts anything."""
    held = signal.getsignal(signal.SIGINT) is _raise
    if held:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        if held:
            signal.signal(signal.SIGINT, _raise)


def raised() -> bool:
    """Whether a KeyboardInterrupt was raised: an error after it is most likely of its making."""
    return _raised


def _end(number: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, _LINE)
    os._exit(128 + number)


def _raise(_number: int, _frame: FrameType | None) -> None:
    global _raised
    _raised = True
    raise KeyboardInterrupt
