"""`voidbus image`: the guest images machines boot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.interrupts import importing
from voidbus.cli.options import json_option
from voidbus.cli.output import note, plain, plural, print_json, print_table, say, size
from voidbus.vm.image.agent_layers import AGENTS, AgentLayer, agent_layers
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.store import GuestImage, ImageStore, default_store, least_memory


@click.group()
def image() -> None:
    """Build and look after the guest images that machines boot. Needs no supervisor."""


@contextmanager
def _failures() -> Iterator[None]:
    """What goes wrong with images is told in a line."""
    try:
        yield
    except ImageError as error:
        raise Failure(plain(str(error))) from error


@image.command()
@click.argument("name", default="base", metavar="[NAME]")
@json_option
def build(name: str, as_json: bool) -> None:
    """Build the image NAME and make it the current one.

    NAME is base, made of the distribution's packages; or claude or codex, the layer with that
    agent, made of its npm package: the version voidbus was tried with, or NAME@VERSION. Needs no
    root: packages are only downloaded and unpacked, in the user's cache. What is there already is
    not made again.
    """
    with importing():
        from voidbus.vm.image.build import build_image

    if name.partition("@")[0] in AGENTS:
        _build_agent(name, as_json)
        return
    with _failures():
        store = default_store()
        made = build_image(store, name, lambda text: note(f"voidbus: {text}"))
        document = _document(made, store)
    if as_json:
        print_json(document)
        return
    say(f"image {made.name} {made.digest[:12]}, kernel {made.manifest.kernel_release}")
    say(f"  {made.kernel}")
    say(f"  {made.initramfs}")
    memory = document["least_memory_mb"]
    unpacked = size(made.manifest.unpacked_bytes)
    say(f"  {unpacked} unpacked; a machine needs {memory} MiB of memory or more")


def _build_agent(name: str, as_json: bool) -> None:
    with importing():
        from voidbus.vm.image.agent_layers import build_agent_layer

    with _failures():
        made = build_agent_layer(default_store().root, name, lambda text: note(f"voidbus: {text}"))
    if as_json:
        print_json(_layer_document(made))
        return
    say(f"agent {made.name} {made.version}")
    say(f"  {made.layer}")
    say(f"  {size(made.bytes)}; in a machine: {', '.join(made.programs)}")


@image.command("list")
@json_option
def list_images(as_json: bool) -> None:
    """List the images in the cache; the current one is what machines boot."""
    with _failures():
        store = default_store()
        documents = [_document(each, store) for each in store.list()]
        layers = [_layer_document(each) for each in agent_layers(store.root)]
    if as_json:
        print_json({"store": str(store.root), "images": documents, "agents": layers})
        return
    rows = [
        (
            document["name"],
            document["digest"][:12],
            document["kernel_release"],
            size(document["unpacked_bytes"]),
            f"{document['least_memory_mb']}MiB",
            "yes" if document["current"] else "",
        )
        for document in documents
    ]
    if rows:
        print_table(("NAME", "DIGEST", "KERNEL", "UNPACKED", "MEMORY", "CURRENT"), rows)
    else:
        note(f"voidbus: no image in {store.root}; build one with `voidbus image build`")
    if layers:
        if rows:
            say("")
        print_table(
            ("AGENT", "VERSION", "PACKAGE", "SIZE"),
            [
                (each["name"], each["version"], each["package"], size(each["size"]))
                for each in layers
            ],
        )


@image.command()
@json_option
def verify(as_json: bool) -> int:
    """Read every cached image and layer and compare it with its digest.

    Exits with 1 where something is damaged.
    """
    with _failures():
        store = default_store()
        problems = store.verify()
    if as_json:
        print_json({"ok": not problems, "store": str(store.root), "problems": list(problems)})
    else:
        for problem in problems:
            say(plain(problem))
        if not problems:
            say(f"{store.root}: ok")
    return ExitCode.FAILED if problems else ExitCode.OK


@image.command()
@click.option("--layers", is_flag=True, help="Remove the layers made of container images.")
@click.option("--all", "everything", is_flag=True, help="Remove everything.")
@json_option
def clean(layers: bool, everything: bool, as_json: bool) -> None:
    """Remove from the cache what the current images have no use for."""
    with _failures():
        cleaned = default_store().clean(layers=layers, everything=everything)
    if as_json:
        print_json({"removed": cleaned.entries, "freed_bytes": cleaned.bytes})
    else:
        say(f"{plural(cleaned.entries, 'item')} removed, {size(cleaned.bytes)} freed")


def _layer_document(layer: AgentLayer) -> dict[str, Any]:
    """An agent's layer as JSON; docs/cli.md has the fields."""
    return {
        "name": layer.name,
        "version": layer.version,
        "package": layer.package,
        "layer": str(layer.layer),
        "size": layer.bytes,
        "programs": list(layer.programs),
    }


def _document(image: GuestImage, store: ImageStore) -> dict[str, Any]:
    """An image as JSON; docs/cli.md has the fields."""
    manifest = image.manifest
    try:
        current = store.find(image.name)
    except ImageError:
        current = None
    return {
        "name": image.name,
        "digest": image.digest,
        "current": current is not None and current.digest == image.digest,
        "kernel": str(image.kernel),
        "initramfs": str(image.initramfs),
        "kernel_release": manifest.kernel_release,
        "unpacked_bytes": manifest.unpacked_bytes,
        "least_memory_mb": least_memory(image),
        "programs": list(manifest.programs),
        "modules": list(manifest.modules),
        "parts": [
            {"name": p.name, "version": p.version, "sha256": p.sha256, "size": p.size}
            for p in manifest.parts
        ],
    }
