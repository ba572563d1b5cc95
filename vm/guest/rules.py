"""What the programs of a machine must keep to: decided once, before the first one runs.

Who decides depends on the host. One that negotiated CONFIGURE says it in that message, and
until then nothing runs for it. Any other host writes the two files of the protocol ("Guest
agent boot"), which are read when the first program is to run. Afterwards nothing widens them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from .configure_messages import decode_limits
from .frames import ProtocolError
from .limits import Limits

ALLOWLIST = "/etc/voidbox/allowed_commands.json"
LIMITS = "/etc/voidbox/resource_limits.json"

FILE_BYTES = 1024 * 1024
"""Most of such a file that is read."""

_LIMIT_KEYS = {
    "max_open_files": "open_files",
    "max_processes": "processes",
    "max_file_size": "file_bytes",
}
"""The names of the limits in the protocol's file, and ours."""


class Rules:
    """The rules of one machine. ``path`` makes a guest path real; ``take`` puts limits in
    force and returns what went wrong. ``decided``: the rules given are final."""

    def __init__(
        self,
        allowed: tuple[str, ...] | None,
        *,
        decided: bool,
        path: Callable[[str], str],
        take: Callable[[Limits], list[str]],
    ) -> None:
        self._allowed = allowed
        self._decided = decided
        self._path = path
        self._take = take
        self._lock = threading.Lock()
        self.blocked: str | None = None
        """Why nothing may run here at all, whatever the rules say."""

    def decide(self, allowed: tuple[str, ...] | None, limits: Limits | None) -> list[str]:
        """Set the rules; what went wrong with them. Raises ValueError when they are set."""
        with self._lock:
            if self._decided:
                raise ValueError("this machine is configured already")
            faults = [] if limits is None else self._take(limits)
            self._allowed = allowed
            self._decided = True
            return faults

    def refusal(self, program: str, *, told: bool) -> str | None:
        """Why a program may not run, or None. ``told``: the host that asks tells the rules by
        itself, so no file decides for it."""
        if self.blocked is not None:
            return self.blocked
        with self._lock:
            if not self._decided:
                if told:
                    return "this machine is not configured yet, so nothing may run"
                reason = self._read_files()
                if reason is not None:
                    return reason
        if self._allowed is None or program.rpartition("/")[2] in self._allowed:
            return None
        return f"Command '{program}' is not in the allowed commands list"

    def _read_files(self) -> str | None:
        for name, read in ((LIMITS, self._read_limits), (ALLOWLIST, self._read_allowlist)):
            try:
                read()
            except (OSError, ValueError) as error:
                return f"{name} can't be used, so nothing may run: {error}"
        self._decided = True
        return None

    def _read_limits(self) -> None:
        values = self._json(LIMITS)
        if values is None:
            return
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        ours = {_LIMIT_KEYS.get(str(key), str(key)): value for key, value in values.items()}
        try:
            limits = decode_limits(ours)
        except ProtocolError as error:
            raise ValueError(str(error)) from None
        self._take(limits)

    def _read_allowlist(self) -> None:
        value = self._json(ALLOWLIST)
        if value is None:
            return
        if isinstance(value, dict):
            value = value.get("allowed_commands")
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError("it is not a JSON array of names")
        self._allowed = tuple(value)

    def _json(self, path: str) -> Any:
        """The content of a file; None when there is none."""
        try:
            with open(self._path(path), "rb") as file:  # noqa: PTH123 - pathlib loads slowly
                return json.loads(file.read(FILE_BYTES))
        except FileNotFoundError:
            return None
