"""Becomes a program on the terminal that is its standard input.

Run as ``python -I -S pty_launch.py UID:GID|- FSIZE|- PROGRAM [ARGS...]`` in a session of its
own. A small program rather than code between fork and exec: the agent has threads, and after
a fork only the exec is safe. Exit codes: 127 the program could not be run, 126 its user
could not be taken (protocol, "PTY").
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
import termios


def main(argv: list[str]) -> int:
    identity, lift, program, *args = argv
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if lift == "lift":
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        except (OSError, ValueError):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    if identity != "-":
        uid, gid = map(int, identity.split(":"))
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        except OSError as error:
            print(f"cannot become user {uid}: {error.strerror}", file=sys.stderr)
            return 126
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by the interpreter
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(program, [program, *args])  # noqa: S606 - running it is the point
    except (OSError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
