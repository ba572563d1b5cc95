"""The agents' layers: what npm fetches is what was tried, and becomes one layer with a record."""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from image_kit import link, member, tar

from voidbus.vm.image import agent_layers
from voidbus.vm.image.agent_layers import (
    AGENTS,
    CLAUDE,
    AgentLayer,
    AgentRecipe,
    agent_layer,
    build_agent_layer,
)
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.store import ImageStore

pytestmark = pytest.mark.needs("squashfs")

PROGRAM = member("package/claude", b"\x7fELF program", mode=0o755)
README = member("package/README.md", b"read me", mode=0o644)

# Packs what lies beside it, and notes how it was called.
_NPM = """#!{python}
import pathlib, shutil, sys
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if (here / "error").exists():
    sys.exit((here / "error").read_text())
if sys.argv[1] == "view":
    print((here / "view").read_text())
else:
    folder = sys.argv[sys.argv.index("--pack-destination") + 1]
    shutil.copy(here / "package.tgz", pathlib.Path(folder) / "x-1.tgz")
"""


def integrity(content: bytes) -> str:
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


class Registry:
    """An `npm` on PATH, the package it packs, and a recipe of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.root = folder / "store"
        self.root.mkdir()
        npm = folder / "bin/npm"
        npm.parent.mkdir()
        npm.write_text(_NPM.format(python=sys.executable))
        npm.chmod(0o755)
        monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
        self._monkeypatch = monkeypatch
        self.publish(PROGRAM, README)

    def publish(self, *members: tuple[object, bytes]) -> None:
        content = gzip.compress(tar(*members), mtime=0)
        (self.folder / "bin/package.tgz").write_bytes(content)
        self.recipe(integrity=integrity(content), version="1.0", dropped=("voice",))

    def recipe(self, **fields: object) -> None:
        recipe: AgentRecipe = replace(AGENTS["claude"], **fields)  # type: ignore[arg-type]
        self._monkeypatch.setitem(AGENTS, "claude", recipe)

    def answer_view(self, text: str) -> None:
        (self.folder / "bin/view").write_text(text)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "bin/calls"
        return path.read_text().splitlines() if path.exists() else []

    def build(self, wanted: str = "claude") -> AgentLayer:
        return build_agent_layer(self.root, wanted, lambda _: None)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(tmp_path, monkeypatch)


def listing(layer: Path) -> dict[str, str]:
    """Mode, owner and target of each file in a squashfs."""
    shown = subprocess.run(
        ["unsquashfs", "-lln", str(layer)], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    lines = (
        re.match(r"(\S{10}) (\d+/\d+) .* squashfs-root(\S+)( -> \S+)?$", line)
        for line in shown.splitlines()
    )
    return {m[3]: f"{m[1]} {m[2]}{m[4] or ''}" for m in lines if m and m[1][0] != "d"}


def test_a_package_becomes_a_layer_with_its_programs_on_path(registry: Registry) -> None:
    made = registry.build()
    assert (made.name, made.version) == ("claude", "1.0")
    assert listing(made.layer) == {
        "/usr/local/bin/claude": "lrwxrwxrwx 0/0 -> /usr/local/lib/claude-code/claude",
        "/usr/local/bin/claude-code": "lrwxrwxrwx 0/0 -> /usr/local/lib/claude-code/claude",
        "/usr/local/lib/claude-code/README.md": "-rw-r--r-- 0/0",
        "/usr/local/lib/claude-code/claude": "-rwxr-xr-x 0/0",
    }
    assert agent_layer(registry.root, "claude") == made
    assert [call.split()[:2] for call in registry.calls] == [["pack", f"{CLAUDE.package}@1.0"]]
    assert "--ignore-scripts" in registry.calls[0], "nothing of the package's is run"
    assert sorted(p.name for p in registry.root.iterdir()) == ["agents", "layers", "layers.lock"]


def test_a_layer_that_is_there_is_not_made_again(registry: Registry) -> None:
    assert registry.build() == registry.build()
    assert len(registry.calls) == 1


def test_another_package_than_the_one_that_was_tried_is_refused(registry: Registry) -> None:
    registry.recipe(integrity=integrity(b"another"))
    with pytest.raises(ImageError, match=r"not the one that was tried.*npm config get registry"):
        registry.build()
    with pytest.raises(ImageError, match="there is no layer of the agent claude"):
        agent_layer(registry.root, "claude")
    assert list((registry.root / "layers").iterdir()) == []


def test_another_version_has_the_digest_npm_says(registry: Registry) -> None:
    content = (registry.folder / "bin/package.tgz").read_bytes()
    registry.answer_view(f'{{"version": "2.0", "dist.integrity": "{integrity(content)}"}}')
    made = registry.build("claude@latest")
    assert made.version == "2.0"
    assert agent_layer(registry.root, "claude").version == "2.0", "machines have it from now on"
    registry.answer_view(f'{{"version": "2.1", "dist.integrity": "{integrity(b"x")}"}}')
    with pytest.raises(ImageError, match="not the one"):
        registry.build("claude@2.1")
    assert agent_layer(registry.root, "claude").version == "2.0"


@pytest.mark.parametrize("said", ["", "null", "[]", '{"version": "2.0"}', "no JSON"])
def test_a_version_npm_does_not_know_is_refused(registry: Registry, said: str) -> None:
    registry.answer_view(said)
    with pytest.raises(ImageError, match=r"npm knows no .*@9\.9; see `npm view"):
        registry.build("claude@9.9")


@pytest.mark.parametrize("digest", ["sha1-abc", "sha512-abc", "sha512-!", ""])
def test_a_digest_that_is_none_is_refused(registry: Registry, digest: str) -> None:
    registry.answer_view(f'{{"version": "2.0", "dist.integrity": "{digest}"}}')
    with pytest.raises(ImageError, match="no SHA-512 digest"):
        registry.build("claude@2.0")


@pytest.mark.parametrize("version", ["../x", "1 2", "-g", "a" * 100, "1@2"])
def test_what_is_no_version_is_refused_before_npm_sees_it(registry: Registry, version: str) -> None:
    with pytest.raises(ImageError, match="no version of an npm package"):
        registry.build(f"claude@{version}")
    assert registry.calls == []


def test_a_host_without_npm_is_told_how_to_get_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = registry.folder / "tools"
    tools.mkdir()
    squashfs = shutil.which("sqfstar")
    assert squashfs is not None
    (tools / "sqfstar").symlink_to(squashfs)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(ImageError, match=r"npm is not on this host.*apt-get install npm"):
        registry.build()


def test_what_npm_says_of_its_failure_is_said(registry: Registry) -> None:
    (registry.folder / "bin/error").write_text("npm error code E404\nnpm error 404 Not Found\n")
    with pytest.raises(ImageError, match=r"`npm pack .*` failed: code E404 \| 404 Not Found"):
        registry.build()


def test_a_package_laid_out_in_another_way_is_refused(registry: Registry) -> None:
    registry.publish(README)
    with pytest.raises(ImageError, match=r"has no claude; this version is laid out"):
        registry.build()


def test_a_package_that_is_damaged_is_refused(registry: Registry) -> None:
    content = gzip.compress(tar(PROGRAM, member("package/more", os.urandom(100_000))), mtime=0)
    half = content[: len(content) // 2]
    (registry.folder / "bin/package.tgz").write_bytes(half)
    registry.recipe(integrity=integrity(half))
    with pytest.raises(ImageError, match="is damaged"):
        registry.build()


def test_of_a_package_only_its_files_are_taken_and_none_elsewhere(registry: Registry) -> None:
    registry.publish(
        PROGRAM,
        member("package/../../etc/passwd", b"x"),
        member("/etc/shadow", b"x"),
        member("other/file", b"x"),
        member("package/voice/model", b"x"),
        link("package/away", "/etc/passwd"),
        link("package/again", "package/claude", hard=True),
        member("package/device", None, type=b"3"),
    )
    assert sorted(listing(registry.build().layer)) == [
        "/usr/local/bin/claude",
        "/usr/local/bin/claude-code",
        "/usr/local/lib/claude-code/claude",
    ]


def test_a_package_without_end_is_refused(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_layers, "_UNPACKED_LIMIT", 1000)
    registry.publish(PROGRAM, member("package/zeros", bytes(10_000)))
    with pytest.raises(ImageError, match="too large"):
        registry.build()


def test_a_layer_that_was_written_to_or_is_gone_is_found_out(registry: Registry) -> None:
    made = registry.build()
    store = ImageStore(registry.root)
    assert list(store.verify()) == []
    made.layer.chmod(0o644)
    with made.layer.open("r+b") as file:
        file.seek(100)
        file.write(b"changed")
    with pytest.raises(ImageError, match=r"damaged.*voidbus image build claude"):
        agent_layer(registry.root, "claude")
    assert any("differs" in problem for problem in store.verify())
    made.layer.unlink()
    with pytest.raises(ImageError, match="is missing; run `voidbus image build claude`"):
        agent_layer(registry.root, "claude")
    assert any("run `voidbus image build claude`" in problem for problem in store.verify())
    assert registry.build() == made, "it is made anew"


@pytest.mark.parametrize("record", ["", "{}", '{"format": 99}'])
def test_a_record_that_is_damaged_says_what_to_do(registry: Registry, record: str) -> None:
    registry.build()
    (registry.root / "agents/claude.json").write_text(record)
    with pytest.raises(ImageError, match="voidbus image build claude"):
        agent_layer(registry.root, "claude")
    assert any("voidbus image build claude" in each for each in ImageStore(registry.root).verify())


def test_cleaning_leaves_the_agents_layers_unless_everything_goes(registry: Registry) -> None:
    made = registry.build()
    store = ImageStore(registry.root)
    store.clean(layers=True)
    assert agent_layer(registry.root, "claude") == made
    store.clean(everything=True)
    assert not made.layer.exists()
    with pytest.raises(ImageError, match="there is no layer"):
        agent_layer(registry.root, "claude")
