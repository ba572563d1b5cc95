"""What is wrong with a specification or a configuration, and where."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning"]
# A place inside a document: field names and list indexes, outermost first.
Location = tuple[str | int, ...]

# The longest a problem is printed, in characters: a few terminal lines.
_MAX_LINE = 1000


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a source. `line` and `column` count from 1; 0 where the source has no lines
    (an environment variable, a command-line flag)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong, with all that is needed to mend it.

    `field` is a path such as `agent.skills[2]`, empty for the document itself. `found`, `allowed`
    and `suggestion` are None where there is nothing to say.
    """

    position: Position
    field: str
    message: str
    found: str | None = None
    allowed: str | None = None
    suggestion: str | None = None
    level: Level = "error"

    @property
    def file(self) -> str:
        return self.position.source

    @property
    def line(self) -> int:
        return self.position.line

    @property
    def column(self) -> int:
        return self.position.column

    def __str__(self) -> str:
        details = [
            f"{word} {text}"
            for word, text in (("found", self.found), ("allowed", self.allowed))
            if text is not None
        ]
        line = f"{self.position}: "
        line += f"{self.field}: {self.message}" if self.field else self.message
        if details:
            line += f" ({'; '.join(details)})"
        if self.suggestion is not None:
            line += f". Did you mean '{self.suggestion}'?"
        return _printable(line)


class SpecError(Exception):
    """A specification or configuration that can't be used. `problems` has every error found, and
    the warnings met on the way; there is at least one error."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.level == "error")

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


def _printable(line: str) -> str:
    """One line that is safe on a terminal: names come from the document, and may be anything."""
    if len(line) > _MAX_LINE:
        line = line[: _MAX_LINE - 3] + "..."
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in line
    )


def field_path(location: Location) -> str:
    """`("agent", "skills", 2)` as `agent.skills[2]`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate `word` was probably meant to be, or None."""
    # Bounded, because difflib's cost grows with the length and the word may be hostile.
    matches = difflib.get_close_matches(word[:64].lower(), tuple(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None
