"""`voidbus image`: building and looking after guest images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from voidbus.cli import image as image_commands
from voidbus.vm.image import agent_layers, store
from voidbus.vm.image import build as building
from voidbus.vm.image.agent_layers import AgentLayer
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.manifest import Manifest, Part
from voidbus.vm.image.product import Product
from voidbus.vm.image.store import GuestImage, ImageStore

Voidbus = Callable[..., Any]
KEY = "0" * 32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of a user's own, a build that makes a tiny image, and a product of one file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "own_files", lambda: Product("p", (), "1.5"))
    monkeypatch.setattr(store, "product_archive", lambda *_: bytes(512))
    monkeypatch.setattr(building, "build_image", _build)
    return tmp_path / "voidbus/images"


def _build(images: ImageStore, name: str, report: Callable[[str], None]) -> GuestImage:
    if name != "base":
        raise ImageError(f"there is no image {name!r}; there is base")
    report("unpacking packages")
    with images.new_distribution(KEY) as folder:
        if folder is not None:
            (folder / "vmlinux").write_bytes(b"kernel")
            (folder / "base.cpio").write_bytes(bytes(512))
            manifest = Manifest(
                *("base", "6.1", 40 << 20, 512, (Part("bash", "5.2", "ab" * 32, 9),)),
                programs=("/bin/sh",),
            )
            (folder / "manifest.json").write_text(manifest.to_json())
    images.set_current(name, KEY)
    return images.current(name)


def test_building_says_what_was_made_and_shows_its_steps(voidbus: Voidbus, cache: Path) -> None:
    result = voidbus("image", "build")
    assert result.code == 0
    assert "image base " in result.out
    assert f"{cache}/distributions/{KEY}/vmlinux" in result.out
    assert "a machine needs " in result.out
    assert "voidbus: unpacking packages" in result.err


def test_building_prints_one_json_document(voidbus: Voidbus, cache: Path) -> None:
    document = json.loads(voidbus("image", "build", "base", "--json").out)
    assert (document["name"], document["kernel_release"], document["current"]) == (
        *("base", "6.1"),
        True,
    )
    assert document["kernel"] == f"{cache}/distributions/{KEY}/vmlinux"
    assert [(part["name"], part["version"]) for part in document["parts"]] == [
        ("bash", "5.2"),
        ("voidbus", "1.5"),
    ]


IMAGE = {
    *("name", "digest", "current", "kernel", "initramfs", "kernel_release", "unpacked_bytes"),
    *("least_memory_mb", "programs", "modules", "parts"),
}


def test_each_commands_json_has_the_documented_fields(voidbus: Voidbus, cache: Path) -> None:
    built = json.loads(voidbus("image", "build", "--json").out)
    assert set(built) == IMAGE
    assert set(built["parts"][0]) == {"name", "version", "sha256", "size"}
    listed = json.loads(voidbus("image", "list", "--json").out)
    assert set(listed) == {"store", "images", "agents"}
    assert [set(image) for image in listed["images"]] == [IMAGE]
    verified = json.loads(voidbus("image", "verify", "--json").out)
    assert verified == {"ok": True, "store": str(cache), "problems": []}
    cleaned = json.loads(voidbus("image", "clean", "--json").out)
    assert cleaned == {"removed": 0, "freed_bytes": 0}


def test_an_image_that_is_not_known_is_an_error_in_a_line(voidbus: Voidbus, cache: Path) -> None:
    result = voidbus("image", "build", "other")
    assert (result.code, result.out) == (1, "")
    assert result.err == "voidbus: error: there is no image 'other'; there is base\n"


def test_images_are_listed_with_the_current_one_marked(voidbus: Voidbus, cache: Path) -> None:
    empty = voidbus("image", "list")
    assert (empty.code, empty.out) == (0, "")
    assert "voidbus image build" in empty.err
    voidbus("image", "build")
    title, row = voidbus("image", "list").out.splitlines()
    assert title.split() == ["NAME", "DIGEST", "KERNEL", "UNPACKED", "MEMORY", "CURRENT"]
    assert row.split()[0] == "base"
    assert row.split()[-1] == "yes"
    document = json.loads(voidbus("image", "list", "--json").out)
    assert document["store"] == str(cache)
    assert len(document["images"]) == 1


def test_damage_is_found_by_verify_which_exits_with_1(voidbus: Voidbus, cache: Path) -> None:
    voidbus("image", "build")
    assert voidbus("image", "verify").code == 0
    (cache / "distributions" / KEY / "vmlinux").write_bytes(b"KERNEL")
    result = voidbus("image", "verify")
    assert result.code == 1
    assert "vmlinux is not what was put there" in result.out
    document = json.loads(voidbus("image", "verify", "--json").out)
    assert document["ok"] is False
    assert len(document["problems"]) == 1


def test_cleaning_says_what_it_freed(voidbus: Voidbus, cache: Path) -> None:
    voidbus("image", "build")
    (cache / "packages").mkdir()
    (cache / "packages/old.deb").write_bytes(bytes(100))
    assert voidbus("image", "clean").out == "1 item removed, 100B freed\n"
    assert json.loads(voidbus("image", "clean", "--all", "--json").out)["removed"] == 3
    assert "voidbus image build" in voidbus("image", "list").err


# -- agents ------------------------------------------------------------------------------------


@pytest.fixture
def agent(cache: Path, monkeypatch: pytest.MonkeyPatch) -> AgentLayer:
    """A build that makes what would be the layer of Claude Code."""
    made = AgentLayer("claude", "1.2", "@x/claude", cache / "l.squashfs", 2 << 20, ("/bin/claude",))

    def build(root: Path, wanted: str, report: Callable[[str], None]) -> AgentLayer:
        if wanted != "claude":
            raise ImageError(f"npm knows no {wanted}")
        report("fetching @x/claude@1.2")
        return made

    monkeypatch.setattr(agent_layers, "build_agent_layer", build)
    monkeypatch.setattr(image_commands, "agent_layers", lambda _: [made])
    return made


def test_an_agents_layer_is_built_by_the_agents_name(voidbus: Voidbus, agent: AgentLayer) -> None:
    result = voidbus("image", "build", "claude")
    assert result.code == 0
    assert "agent claude 1.2" in result.out
    assert str(agent.layer) in result.out
    assert "2.0MiB; in a machine: /bin/claude" in result.out
    assert "voidbus: fetching @x/claude@1.2" in result.err


def test_an_agents_layer_is_one_json_document(voidbus: Voidbus, agent: AgentLayer) -> None:
    document = json.loads(voidbus("image", "build", "claude", "--json").out)
    assert document == {
        "name": "claude",
        "version": "1.2",
        "package": "@x/claude",
        "layer": str(agent.layer),
        "size": 2 << 20,
        "programs": ["/bin/claude"],
    }
    assert json.loads(voidbus("image", "list", "--json").out)["agents"] == [document]


def test_a_version_of_an_agent_that_is_not_there_is_told_in_a_line(
    voidbus: Voidbus, agent: AgentLayer
) -> None:
    result = voidbus("image", "build", "claude@9")
    assert (result.code, result.out) == (1, "")
    assert result.err == "voidbus: error: npm knows no claude@9\n"


def test_agents_are_listed_behind_the_images(voidbus: Voidbus, agent: AgentLayer) -> None:
    alone = voidbus("image", "list")
    assert "no image in" in alone.err
    assert alone.out.split("\n")[0].split() == ["AGENT", "VERSION", "PACKAGE", "SIZE"]
    voidbus("image", "build")
    lines = voidbus("image", "list").out.splitlines()
    assert lines[0].startswith("NAME")
    assert lines[2] == ""
    assert lines[4].split() == ["claude", "1.2", "@x/claude", "2.0MiB"]
