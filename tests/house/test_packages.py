"""The folders and pyproject.toml agree, files keep their size, and no machine is named in them."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("transport", "actors", "vm", "sidecar", "mcp", "gateway", "spec", "cli")
# A file past 400 lines is usually two ideas; one past this is.
LONGEST = 600
# Paths and hosts of whatever machine somebody worked on. In pieces, as this file is read too.
MACHINE_WORDS = re.compile(
    "|".join(
        (
            r"(?<!\w)/" + r"work/(?!\W)",  # not a guest's /mnt/work
            r"/home/(?!u\b|me\b|user\b|you\b|agent\b|sandbox\b)[a-z]\w*",
            r"/Users/\w",
            r"\b(?:pypi|registry|proxy|artifactory|nexus|mirror)[\w.-]*\.(?:internal|corp|lan)\b",
            r"(?:--|\b)(?:extra-)?index-url\b",
        )
    )
)


def setuptools() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    listed: dict[str, Any] = table["setuptools"]
    return listed


def packages() -> dict[str, str]:
    """Every folder that is a package: its name and its path."""
    folders = sorted(p.parent.relative_to(ROOT) for f in FOLDERS for p in (ROOT / f).rglob("*.py"))
    return {".".join(("voidbus", *folder.parts)): folder.as_posix() for folder in folders}


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=30,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout, so nothing says which files belong to the product")
    paths = (ROOT / name.decode() for name in listed.stdout.split(b"\0") if name)
    return sorted(path for path in paths if path.is_file())


def test_every_package_folder_is_listed_to_be_installed() -> None:
    assert sorted(setuptools()["packages"]) == sorted(packages())


def test_every_package_is_mapped_to_its_folder() -> None:
    assert setuptools()["package-dir"] == packages()


@pytest.mark.parametrize("folder", sorted(packages().values()))
def test_every_folder_with_code_says_what_it_is(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()


def test_no_file_is_too_long_to_be_one_idea() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked()
        if path.suffix == ".py" and (lines := path.read_bytes().count(b"\n")) > LONGEST
    }
    assert long == {}


def test_no_file_names_the_machine_it_was_written_on() -> None:
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE_WORDS.search(line)
    ]
    assert named == []


@pytest.mark.parametrize(
    "line",
    [
        "see /" + "work/main",
        "cd /home/" + "somebody/voidbus",
        "pip install --index-url x",
        "https://pypi" + ".example.internal/simple",
    ],
)
def test_the_name_of_a_machine_is_seen(line: str) -> None:
    assert MACHINE_WORDS.search(line)


@pytest.mark.parametrize("line", ["open('/mnt/work/big')", "/home/me/.cache", "/home/sandbox"])
def test_a_place_in_a_guest_or_of_an_example_names_no_machine(line: str) -> None:
    assert not MACHINE_WORDS.search(line)
