"""Layers with the agents: the native programs of npm packages, put over the base image.

The packages are fetched by `npm pack`, which runs nothing of theirs, from whatever registry npm is
set to. What comes is compared with the digest written here, so it is the same everywhere.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import os
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from voidbus.vm.image import publishing
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.layers import layer_of_tar
from voidbus.vm.image.manifest import Manifest, Part

Report = Callable[[str], None]

FETCH_SECONDS = 900.0
"""How long npm may take for one package."""

_ASK_SECONDS = 120.0
_UNPACKED_LIMIT = 4 << 30  # bytes of a layer's files
_FILES_LIMIT = 100_000
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,63}\Z")
_LIB = "usr/local/lib"
_BIN = "usr/local/bin"


@dataclass(frozen=True, slots=True)
class AgentRecipe:
    """One agent's layer.

    `package` is the npm package with the program for this processor and C library, in `version`,
    whose `suffix` is added to what a user calls a version; `integrity` is the archive's digest
    as npm writes it (W3C Subresource Integrity). What is below `source` in it is put below
    `target` in the guest, but for what is below one of `dropped`; `links` are the programs' names,
    and where in `target` each leads.
    """

    name: str
    package: str
    version: str
    integrity: str
    source: str
    target: str
    links: tuple[tuple[str, str], ...]
    suffix: str = ""
    dropped: tuple[str, ...] = ()


CLAUDE = AgentRecipe(
    name="claude",
    package="@anthropic-ai/claude-code-linux-x64",
    version="2.1.332",
    integrity="sha512-f4JWhzwYutJIHScC7/dYOPX6s28tt7ZADhsOi8zwOHq5fFPEuUeChh2NMfinSg0GrUckYxaeebC4"
    "h0DqiKzLcw==",
    source="package",
    target=f"{_LIB}/claude-code",
    links=(("claude", "claude"), ("claude-code", "claude")),
)

CODEX = AgentRecipe(
    name="codex",
    package="@openai/codex",
    version="0.169.0",
    suffix="-linux-x64",
    integrity="sha512-o05NyAOCDygSPRo1yinzxvkRSdmsZyBD9E7mbpmjRanSfM8lypqWtQgEo4XfNkwhuCR2aFu8mlGO"
    "sQGFXVbVww==",
    source="package/vendor/x86_64-unknown-linux-musl",
    target=f"{_LIB}/codex",
    links=(("codex", "bin/codex"), ("rg", "codex-path/rg")),
    dropped=(
        "codex-resources/voice",
    ),  # for a microphone and loudspeakers, of which a guest has none
)

AGENTS = {recipe.name: recipe for recipe in (CLAUDE, CODEX)}


@dataclass(frozen=True, slots=True)
class AgentLayer:
    """A layer that is there: the agent's version and package, the squashfs, what it has on the
    guest's PATH."""

    name: str
    version: str
    package: str
    layer: Path
    bytes: int
    programs: tuple[str, ...]


def build_agent_layer(root: Path, wanted: str, report: Report) -> AgentLayer:
    """Makes the layer of an agent in the store at `root`, and has machines use it from now on.

    `wanted` is its name, with `@VERSION` behind it for another version than the one voidbus was
    tried with. What is there already is not made again. Raises ImageError.
    """
    name, _, version = wanted.partition("@")
    recipe = AGENTS[name]
    if version and not _VERSION.match(version):
        raise ImageError(f"{version!r} is no version of an npm package; give one such as 1.2.3")
    version, integrity = _choose(recipe, version, report)
    identity = f"agent {integrity} {recipe}"
    with contextlib.ExitStack() as stack:

        def write(out: BinaryIO) -> None:
            archive = stack.enter_context(_fetched(root, recipe, version, integrity, report))
            report(f"packing {recipe.name} {version}")
            _repack(archive, recipe, out)

        layer = layer_of_tar(root, identity, f"{recipe.name} {version}", write)
    record = Manifest(
        name=recipe.name,
        parts=(Part(recipe.package, version, _hex(integrity), layer.stat().st_size),),
        programs=tuple(f"/{_BIN}/{link}" for link, _ in recipe.links),
        files=(publishing.stored_file(layer, root),),
    )
    with publishing.new_file(_record(root, recipe.name)) as path:
        path.write_text(record.to_json())
    return _as_layer(root, record)


def agent_layer(root: Path, name: str) -> AgentLayer:
    """The layer of an agent, whole. Raises ImageError where it was never made, or is damaged."""
    try:
        record = Manifest.from_json(_record(root, name).read_text())
    except FileNotFoundError as error:
        raise ImageError(
            f"there is no layer of the agent {name} in {root}; build it with "
            f"`voidbus image build {name}`"
        ) from error
    except (OSError, ValueError) as error:
        raise ImageError(
            f"{_record(root, name)} can't be read: {error}; run `voidbus image build {name}`"
        ) from error
    wrong = [text for file in record.files if (text := publishing.damage(root, file))]
    if wrong or not record.files or not record.parts:
        raise ImageError(
            f"the layer of the agent {name} is damaged: {'; '.join(wrong) or 'its record is empty'}"
            f"; run `voidbus image build {name}`"
        )
    return _as_layer(root, record)


def agent_layers(root: Path) -> list[AgentLayer]:
    """Every agent's layer that is there and whole."""
    found = []
    for name in sorted(AGENTS):
        with contextlib.suppress(ImageError):
            found.append(agent_layer(root, name))
    return found


def _record(root: Path, name: str) -> Path:
    return root / "agents" / f"{name}.json"


def _as_layer(root: Path, record: Manifest) -> AgentLayer:
    (part,), (file,) = record.parts, record.files
    version = part.version.removesuffix(AGENTS[record.name].suffix)
    return AgentLayer(record.name, version, part.name, root / file.path, file.size, record.programs)


# -- the package ---------------------------------------------------------------------------------


def _choose(recipe: AgentRecipe, version: str, report: Report) -> tuple[str, str]:
    """The package's version and digest: those written here, else what the registry says."""
    if not version or version == recipe.version:
        return recipe.version + recipe.suffix, recipe.integrity
    report(f"asking npm for {recipe.name} {version}")
    wanted = f"{recipe.package}@{version}{recipe.suffix}"
    said = _npm(["view", wanted, "version", "dist.integrity", "--json"], _ASK_SECONDS)
    try:
        document = json.loads(said or "null")
        found, integrity = document["version"], document["dist.integrity"]
    except (ValueError, KeyError, TypeError):
        raise ImageError(
            f"npm knows no {wanted}; see `npm view {recipe.package} versions`"
        ) from None
    if not _VERSION.match(str(found)):
        raise ImageError(f"npm says that {wanted} is version {str(found)[:80]!r}, which is none")
    return str(found), str(integrity)


@contextlib.contextmanager
def _fetched(
    root: Path, recipe: AgentRecipe, version: str, integrity: str, report: Report
) -> Iterator[BinaryIO]:
    """The package's archive, which is what its digest says."""
    wanted = f"{recipe.package}@{version}"
    report(f"fetching {wanted}")
    with tempfile.TemporaryDirectory(prefix=publishing.TEMPORARY, dir=root) as folder:
        _npm(["pack", wanted, "--pack-destination", folder, "--ignore-scripts"], FETCH_SECONDS)
        archives = list(Path(folder).glob("*.tgz"))
        if len(archives) != 1:
            raise ImageError(f"npm fetched {len(archives)} archives for {wanted} instead of one")
        with archives[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
            if f"sha512-{base64.b64encode(digest).decode()}" != integrity:
                raise ImageError(
                    f"the archive npm fetched for {wanted} is not the one that was tried: its "
                    f"SHA-512 is {digest.hex()[:16]}..., not {_hex(integrity)[:16]}...; see which "
                    "registry npm is set to with `npm config get registry`"
                )
            file.seek(0)
            yield file


def _hex(integrity: str) -> str:
    """The hexadecimal digits of a digest as npm writes it. Raises ImageError."""
    algorithm, _, text = integrity.partition("-")
    try:
        digest = base64.b64decode(text, validate=True)
    except ValueError:
        digest = b""
    if algorithm != "sha512" or len(digest) != hashlib.sha512().digest_size:
        raise ImageError(f"{integrity[:100]!r} is no SHA-512 digest as npm writes one")
    return digest.hex()


def _npm(arguments: list[str], timeout: float) -> str:
    command = ["npm", *arguments, "--no-audit", "--no-fund", "--no-update-notifier"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            cwd="/",  # a project's own .npmrc is no concern of ours
        )
    except FileNotFoundError as error:
        raise ImageError(
            "npm is not on this host, and agents come as npm packages; install it with "
            "`sudo apt-get install npm`"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(
            f"`npm {arguments[0]}` has not ended within {timeout:g} s; look at the network"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        said = " | ".join(line.removeprefix("npm error").strip() for line in lines[:4])
        raise ImageError(
            f"`npm {' '.join(arguments[:2])}` failed: {said or done.stderr.strip()[:400]}"
        )
    return done.stdout


# -- the layer -----------------------------------------------------------------------------------


def _repack(archive: BinaryIO, recipe: AgentRecipe, out: BinaryIO) -> None:
    """Writes the layer as a tar archive: whole files owned by root, and the programs' names."""
    try:
        _take(archive, recipe, out)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ImageError(f"the package of {recipe.name} is damaged: {error}") from error


def _take(archive: BinaryIO, recipe: AgentRecipe, out: BinaryIO) -> None:
    taken: set[str] = set()
    folders: set[PurePosixPath] = set()
    total = 0
    with (
        tarfile.open(fileobj=archive, mode="r:gz") as package,
        tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as layer,
    ):
        for member in package:
            path = _place(member.name, recipe)
            if path is None or not member.isreg():
                continue
            total += member.size
            if total > _UNPACKED_LIMIT or len(taken) >= _FILES_LIMIT:
                raise ImageError(f"the package of {recipe.name} is too large for a layer")
            content = package.extractfile(member)
            assert content is not None
            _add_folders(layer, path, folders)
            info = tarfile.TarInfo(path)
            info.size, info.mtime = member.size, 0
            info.mode = 0o755 if member.mode & 0o111 else 0o644
            layer.addfile(info, content)
            taken.add(path)
        for name, inside in recipe.links:
            program = f"{recipe.target}/{inside}"
            if program not in taken:
                raise ImageError(
                    f"the package of {recipe.name} has no {inside}; this version is laid out in "
                    f"another way than {recipe.version}, with which voidbus was tried"
                )
            _add_folders(layer, f"{_BIN}/{name}", folders)
            link = tarfile.TarInfo(f"{_BIN}/{name}")
            link.type, link.linkname, link.mtime = tarfile.SYMTYPE, f"/{program}", 0
            layer.addfile(link)


def _add_folders(layer: tarfile.TarFile, path: str, there: set[PurePosixPath]) -> None:
    for folder in reversed(PurePosixPath(path).parents[:-1]):
        if folder not in there:
            there.add(folder)
            info = tarfile.TarInfo(os.fspath(folder))
            info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, 0
            layer.addfile(info)


def _place(name: str, recipe: AgentRecipe) -> str | None:
    """Where a package's file is in the guest; None where it is not taken."""
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/"):
        return None
    try:
        inside = PurePosixPath(*parts).relative_to(recipe.source)
    except ValueError:
        return None
    if any(inside.is_relative_to(dropped) for dropped in recipe.dropped):
        return None
    return os.fspath(PurePosixPath(recipe.target) / inside)
