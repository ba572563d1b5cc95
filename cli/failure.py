"""How a command ends: exit codes, and the failure an operator is told of in one line."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the commands exit with; docs/cli.md lists them.

    124 is what timeout(1) uses; 130 and 141 are what a shell reports for SIGINT and SIGPIPE.
    """

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_SUPERVISOR = 3
    NO_SUCH_RUN = 4
    CANCELLED = 5
    TIMED_OUT = 124
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class Failure(Exception):
    """A command can't go on. The text says what happened, to what, and what to do about it."""

    def __init__(self, text: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(text)
        self.code = code
