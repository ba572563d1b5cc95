"""`voidbus version` and `voidbus completion`."""

from __future__ import annotations

import platform
from importlib.metadata import version as installed

import click

from voidbus.cli.output import print_json, say


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the fields of docs/cli.md.")
def version(as_json: bool) -> None:
    """Print the version of voidbus and of what it stands on."""
    import zmq

    versions = {
        "voidbus": installed("voidbus"),
        "python": platform.python_version(),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "kernel": platform.release(),
    }
    if as_json:
        print_json(versions)
        return
    say(f"voidbus {versions.pop('voidbus')}")
    for name, number in versions.items():
        say(f"{name:<8} {number}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options and run ids in a shell.

    bash: eval "$(voidbus completion bash)" in ~/.bashrc;
    zsh: eval "$(voidbus completion zsh)" in ~/.zshrc;
    fish: voidbus completion fish > ~/.config/fish/completions/voidbus.fish
    """
    from click.shell_completion import get_completion_class

    from voidbus.cli.commands import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click completes no {shell}")
    say(kind(cli, {}, "voidbus", "_VOIDBUS_COMPLETE").source())
