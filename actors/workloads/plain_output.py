"""The output of a program that is an agent of no kind we know: text, which is its result."""

from __future__ import annotations

from voidbus.actors.workloads.agent_stream import AgentStream, Said
from voidbus.actors.workloads.conductor import REPORT_LIMIT


class PlainOutput(AgentStream):
    """Keeps the first lines, as much of them as a report holds."""

    speaks = "output"

    def __init__(self) -> None:
        super().__init__()
        self._room = REPORT_LIMIT
        self._kept: list[str] = []

    def feed(self, line: bytes) -> list[Said]:
        text = line.decode(errors="replace")
        if self._room > 0:
            self._kept.append(text)
            self._room -= len(line) + 1
        return [Said("raw", text)]

    def judge(self, program: str, exit_code: int, stderr: bytes) -> str | None:
        """It succeeded when it says so by its exit code."""
        self.result.result = "\n".join(self._kept)
        if not exit_code:
            return None
        self.result.is_error = True
        said = stderr.decode(errors="replace").strip()[-500:]
        return f"{program} ended with exit code {exit_code}" + (f": {said}" if said else "")
