#!/usr/bin/env python3
"""void-mcp: the sidecar as tools and a resource of the Model Context Protocol.

    void-mcp                        on standard input and output
    void-mcp --http [--port PORT]   on http://127.0.0.1:8222/mcp (also: --sse)

VOID_SIDECAR_URL says where the sidecar is: http://IP:PORT. Without it, or when the command line
is wrong or the port taken, it says so on standard error and exits with 1.

Standard library only. It runs as part of voidbus, and where voidbus is not installed from its
own folder, with the folder of the sidecar's client beside it.
"""

import os
import sys
from collections.abc import Sequence
from types import ModuleType


def main(argv: Sequence[str] | None = None) -> int:
    """Run until standard input ends, or until SIGTERM or SIGINT; the exit code."""
    if not __package__:
        _make_package()
    from voidbus.mcp.program import run

    return run(sys.argv[1:] if argv is None else argv)


def _make_package() -> None:
    """Let `voidbus.mcp` and `voidbus.sidecar` be found beside this file, as in a guest."""
    package = ModuleType("voidbus")
    own = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120 - pathlib loads slowly
    package.__path__ = [os.path.dirname(own)]  # noqa: PTH120
    sys.modules.setdefault("voidbus", package)


if __name__ == "__main__":
    sys.exit(main())
