"""void-message: lets the agent in a guest talk to its sidecar from a shell.

    void-message context
    void-message inbox [--since N]
    void-message send --kind proposal|signal|evaluation --audience broadcast|leader
                      --summary TEXT [--priority high|normal|low]
    void-message health

VOID_SIDECAR_URL says where the sidecar is: http://IP:PORT. Prints the sidecar's JSON and
exits 0; on any error says `error: ...` on standard error and exits 1.

Standard library only. It runs as part of voidbus, and as a script in a guest with client.py
copied next to it.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from voidbus.sidecar.client import SidecarClient, SidecarClientError
else:  # run as a script: client.py lies in the same directory
    from client import SidecarClient, SidecarClientError

USAGE = """\
usage: void-message <command>

commands:
  context                            who you are and where the run stands
  inbox [--since N]                  messages for you; --since: only those after version N
  send --kind proposal|signal|evaluation --audience broadcast|leader
       --summary TEXT [--priority high|normal|low]
                                     send an intent (priority: normal)
  health                             whether the sidecar is well
  help                               this text

environment:
  VOID_SIDECAR_URL                   where the sidecar is: http://IP:PORT
"""

_CHOICES = {
    "kind": ("proposal", "signal", "evaluation"),
    "audience": ("broadcast", "leader"),
    "priority": ("high", "normal", "low"),
}


class UsageError(Exception):
    """The command line can't be carried out as it stands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        sys.stderr.write(USAGE)
        return 1
    try:
        client = SidecarClient.from_environment(os.environ)
        body = _run(client, arguments[0], arguments[1:])
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()
    except (UsageError, SidecarClientError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again while exiting.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _run(client: SidecarClient, command: str, rest: list[str]) -> bytes:
    if command in ("help", "-h", "--help"):
        return USAGE.encode()
    if command == "context":
        _options(rest, ())
        return _ask(client, "GET", "/v1/context")
    if command == "health":
        _options(rest, ())
        return _ask(client, "GET", "/v1/health")
    if command == "inbox":
        return _ask(client, "GET", _inbox_path(_options(rest, ("since",))))
    if command == "send":
        return _send(client, _options(rest, ("kind", "audience", "summary", "priority")))
    raise UsageError(f"unknown command: {command} (try: void-message help)")


def _inbox_path(options: dict[str, str]) -> str:
    since = options.get("since")
    if since is None:
        return "/v1/inbox"
    if not (since.isascii() and since.isdigit()):
        raise UsageError(f"invalid since: {since} (expected a version number)")
    return f"/v1/inbox?since={since}"


def _send(client: SidecarClient, options: dict[str, str]) -> bytes:
    intent = {
        "kind": _choice(options, "kind"),
        "audience": _choice(options, "audience"),
        "payload": {"summary_text": _required(options, "summary")},
        "priority": _choice({"priority": "normal", **options}, "priority"),
    }
    # Fresh for each call: sending the same twice on purpose is for the sidecar to judge.
    key = f"{time.time_ns():032x}"
    return _ask(
        client, "POST", "/v1/intents", json.dumps(intent).encode(), {"Idempotency-Key": key}
    )


def _ask(
    client: SidecarClient,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> bytes:
    reply = client.request(method, path, body, headers)
    if reply.status >= 400:
        raise SidecarClientError(f"HTTP {reply.status}: {reply.body.decode('utf-8', 'replace')}")
    return reply.body + b"\n"


def _options(rest: list[str], known: tuple[str, ...]) -> dict[str, str]:
    """`--name VALUE` and `--name=VALUE` pairs; the last of a name counts."""
    options = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in known:
            raise UsageError(f"unknown option: {word} (try: void-message help)")
        if not equals:
            following = next(words, None)
            if following is None:
                raise UsageError(f"--{name} needs a value")
            value = following
        # An argument that is not UTF-8 arrives with surrogates, which JSON can't carry.
        options[name] = os.fsencode(value).decode("utf-8", "replace")
    return options


def _required(options: dict[str, str], name: str) -> str:
    if name not in options:
        raise UsageError(f"--{name} is required")
    return options[name]


def _choice(options: dict[str, str], name: str) -> str:
    value = _required(options, name)
    if value not in _CHOICES[name]:
        raise UsageError(f"invalid {name}: {value} (expected {', '.join(_CHOICES[name])})")
    return value


if __name__ == "__main__":
    sys.exit(main())
