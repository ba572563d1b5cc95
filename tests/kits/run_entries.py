"""Entries for processes started by the tests of the zygote and the spawner."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def exits_with(config: bytes) -> int:
    return int(config)


def writes_report(config: bytes) -> int:
    """Write what the process looks like to the file named in its config."""
    asked = json.loads(config)
    ignored = [int(s) for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN]
    report = {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "fds": sorted(int(fd.name) for fd in Path("/proc/self/fd").iterdir()),
        "comm": Path("/proc/self/comm").read_text().strip(),
        "env": dict(os.environ),
        "cmdline": Path("/proc/self/cmdline").read_bytes().decode(),
        "ignored": ignored,
        "blocked": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "aiohttp": "aiohttp" in sys.modules,
        "size": len(config),
    }
    path = Path(asked["path"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report))
    partial.rename(path)
    print("out")
    print("err", file=sys.stderr)
    return 0


def raises(config: bytes) -> int:
    raise RuntimeError("this run went wrong: " + config.decode())


def waits_for_the_end_of_a_pipe(config: bytes) -> int:
    """Block until nobody holds the fifo named in the config open for writing."""
    with Path(config.decode()).open("rb") as fifo:
        fifo.read()
    return 5


def waits_forever(config: bytes) -> int:
    signal.pause()
    return 0
