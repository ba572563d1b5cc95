"""Imports run downhill only: each folder may import what the table here says, and no more.

The imports are read from the source, those for type checking too; nothing is executed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("transport", "actors", "vm", "sidecar", "mcp", "gateway", "spec", "cli")


@dataclass(frozen=True)
class Rule:
    """What the files of a folder may import besides the standard library and their own folder.

    `voidbus` are modules of the product with all below them, `third` are top-level modules of
    others. `own` is False where not even the own folder may be imported, but for `voidbus`.
    """

    voidbus: tuple[str, ...] = ()
    third: frozenset[str] = frozenset()
    own: bool = True


PYDANTIC = frozenset({"pydantic", "pydantic_core"})  # one project, in two packages
EVERYTHING = tuple(f"voidbus.{folder}" for folder in FOLDERS)
# The first of these paths that a file is, or lies below, rules it.
RULES = {
    # These are the files beside it, where it is run as a script.
    "vm/guest/claudio.py": Rule(
        ("voidbus.vm.guest",), third=frozenset({"claudio_mcp", "claudio_stream"}), own=False
    ),
    "vm/guest": Rule(),
    "sidecar/client.py": Rule(own=False),
    # `client` is that same file, where the two lie in a guest without the package around them.
    "sidecar/void_message.py": Rule(
        ("voidbus.sidecar.client",), third=frozenset({"client"}), own=False
    ),
    "transport": Rule(third=frozenset({"zmq"}) | PYDANTIC),
    "actors/messages": Rule(("voidbus.transport", "voidbus.sidecar", "voidbus.spec"), PYDANTIC),
    "actors/runtime": Rule(
        ("voidbus.transport", "voidbus.actors.messages"), frozenset({"pykka"}) | PYDANTIC
    ),
    "actors": Rule(
        ("voidbus.transport", "voidbus.vm", "voidbus.sidecar", "voidbus.spec"),
        frozenset({"pykka"}) | PYDANTIC,
    ),
    # Kernels are packed with LZ4, for which the standard library has no decoder.
    "vm/image/kernel.py": Rule(("voidbus.vm",), frozenset({"lz4"})),
    "vm": Rule(("voidbus.spec",)),
    # yarl is aiohttp's own type of a URL, which else would be quoted anew.
    "sidecar/model_gateway.py": Rule(("voidbus.sidecar",), frozenset({"aiohttp", "yarl"})),
    "sidecar": Rule(third=frozenset({"aiohttp"}) | PYDANTIC),
    "mcp": Rule(("voidbus.sidecar.client",)),
    "gateway": Rule(
        (
            "voidbus.transport",
            "voidbus.actors.runtime",
            "voidbus.actors.messages",
            "voidbus.spec",
            # What bounds the connections of an HTTP server is written once.
            "voidbus.sidecar.connection",
        ),
        frozenset({"aiohttp", "prometheus_client"}) | PYDANTIC,
    ),
    "spec": Rule(third=frozenset({"yaml"}) | PYDANTIC),
    "cli": Rule(EVERYTHING, frozenset({"click", "rich", "zmq", "yaml", "aiohttp"}) | PYDANTIC),
}


def sources() -> list[Path]:
    return sorted(p.relative_to(ROOT) for f in FOLDERS for p in (ROOT / f).rglob("*.py"))


def rule_of(source: Path) -> tuple[str, Rule]:
    """The path that rules a file, and its rule."""
    for place, rule in RULES.items():
        if source.as_posix() == place or source.as_posix().startswith(f"{place}/"):
            return place, rule
    raise AssertionError(f"{source}: no rule says what it may import")


def imports(source: Path, text: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each module a file imports."""
    package = ("voidbus", *source.parent.parts)
    for node in ast.walk(ast.parse(text, str(source))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base]) if base else ".".join(above)
            # `from package import module` names a module, or only a name in one: both are told.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def allowed(name: str, place: str, rule: Rule) -> bool:
    def below(module: str) -> bool:
        return name == module or name.startswith(f"{module}.")

    top = name.partition(".")[0]
    if top != "voidbus":
        return top in sys.stdlib_module_names or top in rule.third
    if rule.own and below(f"voidbus.{place.replace('/', '.')}"):
        return True
    return any(below(module) for module in rule.voidbus)


def uphill(source: Path, text: str) -> list[str]:
    place, rule = rule_of(source)
    return [
        f"{source}:{line} imports {name}, which {place} may not"
        for line, name in imports(source, text)
        if not allowed(name, place, rule)
    ]


@pytest.mark.parametrize("source", sources(), ids=str)
def test_a_file_imports_only_what_lies_below_it(source: Path) -> None:
    assert uphill(source, (ROOT / source).read_text()) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("actors/run.py", "from voidbus.gateway import actor"),
        ("actors/run.py", "import voidbus.cli.main"),
        ("actors/runtime/actor.py", "from voidbus.actors.run import RunActor"),
        ("actors/runtime/actor.py", "from .. import run"),
        ("transport/hub.py", "from voidbus.actors.runtime.actor import Actor"),
        ("transport/hub.py", "from ..actors import run"),
        ("transport/hub.py", "import aiohttp"),
        ("vm/channel.py", "import pydantic"),
        ("vm/image/store.py", "import lz4.block"),
        ("vm/image/kernel.py", "from voidbus.transport import node"),
        ("vm/channel.py", "from voidbus.transport import node"),
        ("vm/guest/agent.py", "from voidbus.vm.channel import Channel"),
        ("vm/guest/agent.py", "from ..channel import Channel"),
        ("vm/guest/agent.py", "def f():\n    import pydantic"),
        ("sidecar/client.py", "from voidbus.sidecar.state import SidecarState"),
        ("sidecar/void_message.py", "from . import state"),
        ("mcp/server.py", "import mcp"),
        ("mcp/server.py", "from voidbus.sidecar.state import SidecarState"),
        ("gateway/actor.py", "from voidbus.actors.run import RunActor"),
        ("spec/run.py", "from voidbus.vm.machine import MachineSpec"),
    ],
)
def test_an_uphill_import_is_seen(source: str, line: str) -> None:
    """The rules are worth nothing if they let these pass."""
    assert len(uphill(Path(source), line)) == 1


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("actors/run.py", "from voidbus.vm.machine import MachineSpec"),
        ("actors/runtime/actor.py", "import pykka"),
        ("actors/runtime/actor.py", "from . import mailbox"),
        ("vm/guest/agent.py", "from . import frames"),
        ("vm/image/kernel.py", "import lz4.block"),
        ("sidecar/void_message.py", "from .client import Client"),
        ("mcp/server.py", "from voidbus.sidecar.client import Client"),
        ("cli/serve.py", "from voidbus.gateway.actor import Gateway"),
    ],
)
def test_a_downhill_import_is_allowed(source: str, line: str) -> None:
    assert uphill(Path(source), line) == []
