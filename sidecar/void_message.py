"""void-message: lets the agent in a guest talk to its sidecar from a shell.

    void-message context
    void-message inbox [--since N] [--follow]
    void-message send --kind proposal|signal|evaluation --audience broadcast|leader
                      --summary TEXT [--priority high|normal|low]
    void-message health

VOID_SIDECAR_URL says where the sidecar is: http://IP:PORT. Prints the sidecar's JSON and
exits 0; on any error says `error: ...` on standard error and exits 1. With --follow it prints
each entry as a line of JSON, those there are and those that come, until it is interrupted (exit
code 130) or the sidecar has gone.

Standard library only. It runs as part of voidbus, and as a script in a guest with client.py
copied next to it.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from voidbus.sidecar.client import SidecarClient, SidecarClientError
else:  # run as a script: client.py lies in the same directory
    from client import SidecarClient, SidecarClientError

USAGE = """\
usage: void-message <command>

commands:
  context                            who you are and where the run stands
  inbox [--since N] [--follow]       messages for you; --since: only those after version N;
                                     --follow: each on a line, and new ones as they come
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

RECONNECTS = 5
"""How often in a row --follow tries to reach a sidecar again that it has reached before."""

_FIRST_DELAY = 0.1  # seconds before the first of them; each waits twice as long as the last
_BUSY = (429, 503)  # answers that may be others in a moment
_INTERRUPTED = 130  # what a shell reports for SIGINT


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
        if arguments[0] == "inbox" and "--follow" in arguments:
            _follow(client, [word for word in arguments[1:] if word != "--follow"])
        else:
            _write(_run(client, arguments[0], arguments[1:]))
    except (UsageError, SidecarClientError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
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


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _inbox_path(options: dict[str, str]) -> str:
    since = _since(options)
    return "/v1/inbox" if since is None else f"/v1/inbox?since={since}"


def _since(options: dict[str, str]) -> int | None:
    since = options.get("since")
    if since is None:
        return None
    # 20 digits hold any 64-bit version.
    if not (since.isascii() and since.isdigit() and len(since) <= 20):
        raise UsageError(f"invalid since: {since} (expected a version number)")
    return int(since)


def _follow(client: SidecarClient, rest: list[str]) -> None:
    """Print entries as they come, without end. Raises SidecarClientError when the sidecar can't
    be reached at first, or RECONNECTS times after it could."""
    since = _since(_options(rest, ("since",)))
    tries = left = 0
    while True:
        try:
            view = _news(client, since)
        except SidecarClientError as error:
            if left == 0 or isinstance(error, _Refused):
                raise
            time.sleep(_FIRST_DELAY * 2 ** (tries - left))
            left -= 1
            continue
        tries = left = RECONNECTS
        since = view["version"]
        for entry in view["entries"]:
            line = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
            _write(line.encode("utf-8", "replace") + b"\n")


class _Refused(SidecarClientError):
    """The sidecar answers, and asking again would not help."""


def _news(client: SidecarClient, since: int | None) -> dict[str, Any]:
    reply = client.signals(since)
    text = reply.body.decode("utf-8", "replace")
    if reply.status >= 400:
        kind = SidecarClientError if reply.status in _BUSY else _Refused
        raise kind(f"HTTP {reply.status}: {text}")
    try:
        view = json.loads(text)
        if isinstance(view["version"], int) and isinstance(view["entries"], list):
            return dict(view)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise _Refused(f"the sidecar's answer is no inbox: {text[:200]}")


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
