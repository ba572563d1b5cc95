"""The console entry: `voidbus`, and `python -m voidbus.cli.main`.

Only what every interpreter has loaded already is imported at the top, so that Ctrl-C is met by
the guard below however early it comes.
"""

import os
import sys
from collections.abc import Sequence

PROGRAM = "voidbus"
_COMPLETE = "_VOIDBUS_COMPLETE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Nothing is raised: operators see no traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _open_standard_files()
        if arguments is None:
            from voidbus.cli.interrupts import end_at_once

            end_at_once()
        code = _run(given)
        sys.stdout.flush()
        if arguments is None:  # as a program, of which nothing follows but its end
            _ignore_interrupts()
    except KeyboardInterrupt:
        return _leave_at_once()
    except BrokenPipeError:
        return _leave_silently()
    return code


def _open_standard_files() -> None:
    """Python leaves out the standard files it is started without (`>&-`): nobody reads them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - until the end


def _run(arguments: list[str]) -> int:
    """Run a command; what goes wrong becomes a line and a code."""
    import click

    from voidbus.cli.commands import cli
    from voidbus.cli.failure import ExitCode, Failure
    from voidbus.cli.interrupts import raised
    from voidbus.cli.output import warn

    try:
        instruction = os.environ.get(_COMPLETE)
        if instruction:
            from click.shell_completion import shell_complete

            return shell_complete(cli, {}, PROGRAM, _COMPLETE, instruction)
        with cli.make_context(PROGRAM, arguments) as context:
            result = cli.invoke(context)
        return result if isinstance(result, int) else ExitCode.OK
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.UsageError as error:
        hint = f" (see: {error.ctx.command_path} --help)" if error.ctx is not None else ""
        warn(f"error: {error.format_message()}{hint}")
        return ExitCode.USAGE
    except click.ClickException as error:
        warn(f"error: {error.format_message()}")
        return ExitCode.FAILED
    except Failure as failure:
        _show_traceback()
        warn(f"error: {failure}")
        return failure.code
    except BrokenPipeError:
        raise
    except OSError as error:
        _show_traceback()
        warn(f"error: {error}")
        return ExitCode.FAILED
    except Exception as error:  # noqa: BLE001 - the last guard: no command ends in a traceback
        if raised():
            raise KeyboardInterrupt from None
        if not _show_traceback():
            warn(
                f"error: {type(error).__name__}: {error}. This is a fault in voidbus; "
                "set VOIDBUS_DEBUG=1 and run the command again to see where"
            )
        return ExitCode.FAILED


def _show_traceback() -> bool:
    """With VOIDBUS_DEBUG=1, print the exception being handled. Says whether it did."""
    if os.environ.get("VOIDBUS_DEBUG", "") in ("", "0"):
        return False
    import traceback

    traceback.print_exc()
    return True


def _leave_at_once() -> int:
    """After Ctrl-C: one line, and 130 (128 + SIGINT) as shells have it."""
    _ignore_interrupts()
    # Python notes an interrupt that leaves a string of code, as dataclass and namedtuple execute,
    # and at its end kills itself with SIGINT, though it was caught since. Another string clears it.
    exec("")  # noqa: S102
    try:
        sys.stderr.write(f"{PROGRAM}: interrupted\n")
        sys.stderr.flush()
    except OSError:
        return 130
    return 130


def _ignore_interrupts() -> None:
    """A further Ctrl-C, while the interpreter ends, would print a traceback."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave_silently() -> int:
    """After the reader of our output went away (`| head`): 141 (128 + SIGPIPE), and no words."""
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())  # what is still buffered goes nowhere
        os.close(sink)
    except (OSError, ValueError):
        return 141
    return 141


if __name__ == "__main__":
    sys.exit(main())
