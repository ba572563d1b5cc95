"""Read-only layers: made once, the same bytes each time, with the owners a guest should see."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import BinaryIO

import pytest
from guest_vm import eventually
from image_kit import link, member, tar

from voidbus.vm.image import layers
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.layers import layer_of_tar
from voidbus.vm.image.squashfs import set_root_time

needs_squashfs = pytest.mark.needs("squashfs")


def listing(layer: Path) -> dict[str, str]:
    """Mode and owner of each path in a squashfs."""
    shown = subprocess.run(
        ["unsquashfs", "-lln", str(layer)], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    found = {}
    for line in shown.splitlines():
        match = re.match(r"(\S{10}) (\d+/\d+) .* squashfs-root(\S*)( -> \S+)?$", line)
        if match:
            found[match[3] or "/"] = f"{match[1]} {match[2]}{match[4] or ''}"
    return found


def times(layer: Path) -> list[str]:
    """What unsquashfs lists, with times; the topmost directory first."""
    shown = subprocess.run(
        ["unsquashfs", "-lls", str(layer)], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    return [line for line in shown.splitlines() if "squashfs-root" in line]


TOOLS = tar(
    member("bin", None, mtime=1_000_000_000),
    member("bin/tool", b"#!/bin/sh\n", mode=0o755, mtime=1_000_000_000),
    link("bin/other", "tool"),
)


def tools(store: Path, identity: str = "tools") -> Path:
    """The layer with TOOLS in the store."""
    return layer_of_tar(store, identity, "the tools", lambda out: feed(out, TOOLS))


@needs_squashfs
def test_a_layers_topmost_directory_is_roots_whatever_is_in_it(tmp_path: Path) -> None:
    assert listing(tools(tmp_path)) == {
        "/": "drwxr-xr-x 0/0",
        "/bin": "drwxr-xr-x 0/0",
        "/bin/other": "lrwxrwxrwx 0/0 -> tool",
        "/bin/tool": "-rwxr-xr-x 0/0",
    }


@needs_squashfs
def test_a_layer_is_made_once_for_what_it_is_known_by(tmp_path: Path) -> None:
    first = tools(tmp_path)
    inode = first.stat().st_ino
    again = layer_of_tar(tmp_path, "tools", "the tools", lambda _: pytest.fail("made again"))
    assert again.stat().st_ino == inode
    assert tools(tmp_path, "other tools") != first


@needs_squashfs
def test_files_keep_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python, for one, believes a file's time."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "7")
    monkeypatch.setenv("TZ", "UTC")
    (tool,) = (line for line in times(tools(tmp_path)) if line.endswith("/bin/tool"))
    assert "2001-09-09 01:46" in tool


@needs_squashfs
def test_the_same_content_gives_the_same_bytes_at_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    first = tools(tmp_path / "one")
    made = int(time.time())
    assert eventually(lambda: int(time.time()) > made, 5)  # squashfs counts seconds
    second = tools(tmp_path / "two")
    assert first.read_bytes() == second.read_bytes()
    assert times(first)[0].split()[3:5] == ["1970-01-01", "00:00"]


@needs_squashfs
@pytest.mark.parametrize("length", [1, 24, 27, 30, 33, 36, 39, 40, 41, 8300])
def test_the_time_of_the_top_is_found_wherever_its_inode_lies(tmp_path: Path, length: int) -> None:
    """Inodes lie in blocks of 8192 bytes with a header each, and one may lie in two: files take
    32 bytes, a link 24 and its target."""
    links = [link(f"l{number}", "x" * min(length, 3000)) for number in range(1 + length // 3000)]
    content = tar(*(member(f"{number}", b"") for number in range(254)), *links)
    layer = layer_of_tar(tmp_path, f"{length}", "a tar", lambda out: feed(out, content))
    set_root_time(layer, 1_000_000_000)
    assert "2001-09-0" in times(layer)[0]
    assert len(listing(layer)) == 255 + len(links)


def test_what_is_no_squashfs_gets_no_time(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    for content in (b"", b"hsqs", bytes(4096)):
        path.write_bytes(content)
        with pytest.raises(ImageError, match="not the squashfs"):
            set_root_time(path, 0)
        assert path.read_bytes() == content


@needs_squashfs
def test_a_damaged_layer_is_made_anew(tmp_path: Path) -> None:
    layer = tools(tmp_path)
    good = layer.read_bytes()
    layer.write_bytes(good[:-100])
    assert tools(tmp_path).read_bytes() == good


@needs_squashfs
def test_a_tar_keeps_its_owners_and_unusual_names(tmp_path: Path) -> None:
    content = tar(
        member("home/me", None, uid=1000, gid=1000),
        member("a" * 200, b"x", uid=3_000_000_000),
        link("l", "x" * 300),
        member("gr\u00fc\u00dfe", b""),
    )
    layer = layer_of_tar(tmp_path, "id", "a tar", lambda out: feed(out, content))
    found = listing(layer)
    assert found["/home/me"] == "drwxr-xr-x 1000/1000"
    assert found["/" + "a" * 200] == "-rw-r--r-- 3000000000/0"
    assert found["/l"].endswith("-> " + "x" * 300)


def feed(out: BinaryIO, content: bytes) -> None:
    out.write(content)


@needs_squashfs
def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(out: BinaryIO) -> None:
        out.write(tar(member("a", b"x"))[:512])
        raise ImageError("the layer is bad")

    with pytest.raises(ImageError, match="the layer is bad"):
        layer_of_tar(tmp_path, "id", "bad", write)
    assert list((tmp_path / "layers").iterdir()) == []


@needs_squashfs
def test_a_tool_that_fails_is_told_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_OPTIONS", ("-no-such-option",))
    with pytest.raises(ImageError, match=r"sqfstar ended with \d: .*invalid option"):
        layer_of_tar(tmp_path, "id", "it", lambda out: feed(out, tar(member("a", b"x" * 100_000))))


def test_a_host_without_the_tool_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("sqfstar") is None
    with pytest.raises(ImageError, match="sudo apt-get install squashfs-tools"):
        tools(tmp_path)
