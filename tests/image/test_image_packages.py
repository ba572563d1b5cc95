"""Packages: asked for by name, fetched without installing, checked by their digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from voidbus.vm.image.build import choose_packages, distribution_key
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.packages import Package, download, resolve
from voidbus.vm.image.recipe import BASE

DEB = b"the package's file"
SHA256 = hashlib.sha256(DEB).hexdigest()
PACKAGE = Package("tool", "1:2.0-1", SHA256, len(DEB), ())


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs found before the host's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def stanza(name: str, depends: str = "") -> str:
    return (
        f"Package: {name}\nVersion: 1:2.0-1\nDepends: {depends}\nSize: {len(DEB)}\n"
        f"SHA256: {SHA256}\nDescription: words\n SHA256: none of it\n"
    )


def test_versions_come_in_the_order_of_the_names(programs: Path) -> None:
    script(programs, "apt-cache", f"cat <<'E'\n{stanza('b')}\n{stanza('a', 'c (= 1), d:any')}\nE")
    found = resolve(["a", "b"])
    assert [package.name for package in found] == ["a", "b"]
    assert found[0] == Package("a", "1:2.0-1", SHA256, len(DEB), ("c", "d"))


def test_packages_apt_does_not_know_are_named_with_what_to_do(programs: Path) -> None:
    script(programs, "apt-cache", f"cat <<'E'\n{stanza('a')}\nE\nexit 100")
    with pytest.raises(ImageError, match=r"no package b, c; run `sudo apt-get update`"):
        resolve(["a", "b", "c"])


def test_a_host_without_apt_is_told_so(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(ImageError, match=r"apt-cache is not on this host.*VOID_BOX_KERNEL"):
        resolve(["a"])
    with pytest.raises(ImageError, match="apt-get is not on this host"):
        download([PACKAGE], programs, lambda _: None)


def test_a_package_is_fetched_once(programs: Path, tmp_path: Path) -> None:
    script(
        programs,
        "apt-get",
        f'printf "{DEB.decode()}" > tool_1%3a2.0-1_amd64.deb; echo >> {tmp_path}/asked',
    )
    said: list[str] = []
    for _ in range(2):
        files = download([PACKAGE], tmp_path / "packages", said.append)
    assert files["tool"].read_bytes() == DEB
    assert (tmp_path / "asked").read_text() == "\n"
    assert said == ["fetching 1 packages (0 MB)"]
    files["tool"].write_bytes(b"damaged")
    assert download([PACKAGE], tmp_path / "packages", said.append)["tool"].read_bytes() == DEB


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('printf "something else 12" > tool_1_amd64.deb', "was not fetched whole"),
        ("true", "was not fetched whole"),
        ("echo write: No space left on device >&2; exit 100", r"told by apt-get.*; make room"),
        ("echo E: no network >&2; exit 100", r"failed \(100\): E: no network; check the network"),
    ],
)
def test_a_package_that_does_not_come_whole_is_refused(
    programs: Path, tmp_path: Path, text: str, words: str
) -> None:
    script(programs, "apt-get", text)
    with pytest.raises(ImageError, match=words):
        download([PACKAGE], tmp_path / "packages", lambda _: None)
    assert list((tmp_path / "packages").iterdir()) == []


def test_the_kernel_is_the_one_its_package_depends_on(programs: Path) -> None:
    kernel = "linux-image-6.1.0-1-cloud-amd64"
    stanzas = "\n".join(stanza(name) for name in (*BASE.packages, kernel))
    stanzas += "\n" + stanza(BASE.kernel, f"initramfs-tools, {kernel} (= 6.1)")
    script(programs, "apt-cache", f"cat <<'E'\n{stanzas}\nE")
    chosen, packages = choose_packages(BASE)
    assert chosen.name == kernel
    assert [package.name for package in packages] == list(BASE.packages)


def test_another_version_of_a_package_is_another_distribution() -> None:
    newer = Package("tool", "1:2.0-2", "0" * 64, 5, ())
    assert distribution_key((PACKAGE,)) != distribution_key((newer,))
    other = Package("other", "1", "1" * 64, 5, ())
    assert distribution_key((PACKAGE, other)) == distribution_key((other, PACKAGE))
