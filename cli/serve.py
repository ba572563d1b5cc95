"""`voidbus serve`: put the tree together and run it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from voidbus.cli.supervisor_process import SupervisorError, SupervisorProcess
from voidbus.spec.problem import SpecError
from voidbus.spec.supervisor import load_supervisor_config

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def serve(config: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> int:
    """Run the supervisor until it is stopped. Returns the exit status: 2 for a bad configuration,
    1 where it can't start or failed."""
    try:
        settings = load_supervisor_config(config, environ, flags)
    except SpecError as error:
        for problem in error.problems:
            print(f"voidbus: error: {problem}", file=sys.stderr)
        return 2
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.log.format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=settings.log.level.upper(), handlers=[handler])
    try:
        return SupervisorProcess(settings).run()
    except SupervisorError as error:
        print(f"voidbus: error: {error}", file=sys.stderr)
        return 1


class JsonLines(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        import json

        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
