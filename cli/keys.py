"""`voidbus keys`: who may connect from another machine."""

from __future__ import annotations

from pathlib import Path

import click

from voidbus.cli.failure import Failure
from voidbus.cli.options import Place, json_option, state_dir_option
from voidbus.cli.output import print_json, say
from voidbus.cli.state import KEYS_FOLDER
from voidbus.transport.access import AccessError
from voidbus.transport.message import Right
from voidbus.transport.remote import make_client_keys, make_server_keys, save_client_keys


@click.group()
def keys() -> None:
    """Make keys for clients on other machines.

    The supervisor listens for them where its configuration says (remote).
    """


_folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The supervisor's folder of keys (default: keys in its state directory).",
)


@keys.command()
@_folder_option
@json_option
@state_dir_option
@click.pass_obj
def server(place: Place, folder: Path | None, as_json: bool) -> None:
    """Make the supervisor's own keys, where it has none, and print the public one."""
    where = _folder(place, folder)
    try:
        public = make_server_keys(where).decode()
    except AccessError as error:
        raise Failure(str(error)) from error
    if as_json:
        print_json({"public_key": public, "folder": str(where)})
    else:
        say(public)


@keys.command()
@click.argument("name")
@click.option(
    "--right",
    type=click.Choice(["observe", "operate"]),
    default="observe",
    help="What it may do: look (the default), or also change.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where its keys go (default: NAME.keys).",
)
@_folder_option
@json_option
@state_dir_option
@click.pass_obj
def client(
    place: Place, name: str, right: str, out: Path | None, folder: Path | None, as_json: bool
) -> None:
    """Make keys for a client, which is let in from now on.

    Bring the file to the client's machine; it holds a secret. To shut the client out again, remove
    its public key from the folder.
    """
    target = out or Path(f"{name}.keys")
    if target.exists():
        raise Failure(f"{target} is there already; remove it, or give --out FILE")
    try:
        made = make_client_keys(_folder(place, folder), name, Right[right.upper()])
        save_client_keys(target, made)
    except AccessError as error:
        raise Failure(str(error)) from error
    if as_json:
        public = made.public.decode()
        print_json({"name": name, "right": right, "file": str(target), "public_key": public})
        return
    say(f"{target} (bring it to {name}: voidbus --connect tcp://HOST:PORT --keys {target} ps)")


def _folder(place: Place, given: Path | None) -> Path:
    return given.absolute() if given is not None else place.state / KEYS_FOLDER
