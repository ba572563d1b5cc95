"""All commands of `voidbus`, by name."""

from __future__ import annotations

from pathlib import Path

import click

from voidbus.cli.lazy import Entry, LazyGroup
from voidbus.cli.options import Place

ENTRIES = {
    "run": Entry("voidbus.cli.run:run", "Start a run and follow it to its end."),
    "validate": Entry("voidbus.cli.validate:validate", "Check run specifications."),
    "ps": Entry("voidbus.cli.runs:ps", "List runs."),
    "inspect": Entry("voidbus.cli.runs:inspect", "Show one run."),
    "events": Entry("voidbus.cli.events:events", "Show a run's events."),
    "logs": Entry("voidbus.cli.events:logs", "Show what a run's programs print."),
    "artifacts": Entry("voidbus.cli.artifacts:artifacts", "List or fetch the files a run left."),
    "console": Entry("voidbus.cli.console:console", "Show a machine's console."),
    "cancel": Entry("voidbus.cli.cancel:cancel", "Cancel runs and wait until they are gone."),
    "inbox": Entry("voidbus.cli.messaging:inbox", "Replace a run's inbox."),
    "message": Entry("voidbus.cli.messaging:message", "Send a run's agent one message."),
    "intents": Entry("voidbus.cli.messaging:intents", "Show what a run's agent has sent."),
    "actors": Entry("voidbus.cli.actors:actors", "Show every actor and how it is."),
    "telemetry": Entry("voidbus.cli.telemetry:telemetry", "Show what a run uses."),
    "prune": Entry("voidbus.cli.prune:prune", "Forget runs that have ended."),
    "image": Entry("voidbus.cli.image:image", "Build and look after guest images."),
    "serve": Entry("voidbus.cli.serving:serve", "Run the supervisor in the foreground."),
    "stop": Entry("voidbus.cli.stop:stop", "Stop the supervisor and wait until it is gone."),
    "keys": Entry("voidbus.cli.keys:keys", "Make keys for clients on other machines."),
    "doctor": Entry("voidbus.cli.doctor:doctor", "Say what this host can do and how to mend it."),
    "version": Entry("voidbus.cli.about:version", "Print the version."),
    "completion": Entry("voidbus.cli.about:completion", "Print a shell's completion script."),
}


@click.group(
    cls=LazyGroup,
    entries=ENTRIES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where the supervisor keeps its state (default: $VOIDBUS_STATE_DIR, then "
    "$XDG_STATE_HOME/voidbus, then ~/.local/state/voidbus).",
)
@click.option(
    "--connect",
    metavar="tcp://HOST:PORT",
    help="A supervisor on another machine, by one of its remote addresses.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --connect: this client's keys (default: $XDG_CONFIG_HOME/voidbus/client.keys).",
)
@click.version_option(package_name="voidbus", message="%(prog)s %(version)s")
@click.pass_context
def cli(
    context: click.Context, state_dir: Path | None, connect: str | None, keys: Path | None
) -> None:
    """Run AI agents in machines of their own and talk to them.

    Exit codes: 0 done, 1 failed, 2 wrong usage or specification, 3 no supervisor,
    4 no such run, 5 the run was cancelled, 124 timed out, 130 interrupted.
    """
    context.obj = Place(state_dir, connect, keys)
