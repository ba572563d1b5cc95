"""Looking after a store: is everything as it was written, and what can go."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.manifest import read_manifest
from voidbus.vm.image.publishing import TEMPORARY, damage

_KINDS = ("images", "distributions", "refs", "packages", "agents")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was removed: how many files and directories of the store, and their bytes."""

    entries: int
    bytes: int


def published(folder: Path) -> list[Path]:
    """What `folder` holds, sorted by name, without what is only being written."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(TEMPORARY))
    except (FileNotFoundError, NotADirectoryError):
        return []


def verify(root: Path) -> list[str]:
    """Everything that is wrong with the store at `root`, in sentences that say what to do."""
    problems = []
    for kind in ("distributions", "images"):
        for folder in published(root / kind):
            problems += _verify_manifest(root, folder / "manifest.json")
    for record in published(root / "layers"):
        if record.suffix == ".json":
            problems += _verify_manifest(root, record)
    for record in published(root / "agents"):
        problems += _verify_agent(root, record)
    return problems


def _verify_agent(root: Path, path: Path) -> list[str]:
    """Whether the record leads to a layer; whether that is whole is told with the layers."""
    remedy = f"run `voidbus image build {path.stem}`"
    try:
        files = read_manifest(path).files
    except ImageError as error:
        return [f"{error}; {remedy}"]
    missing = [file.path for file in files if not (root / file.path).is_file()]
    return [f"{root / each} is missing; {remedy}" for each in missing]


def _verify_manifest(root: Path, path: Path) -> list[str]:
    try:
        manifest = read_manifest(path)
    except ImageError as error:
        return [str(error)]
    # A kernel that several images share is told of once, with its own manifest.
    place = path.parent.relative_to(root).as_posix()
    own = [record for record in manifest.files if record.path.startswith(f"{place}/")]
    remedy = (
        f"remove {path}, and the run that needs the layer makes it anew"
        if place == "layers"
        else f"run `voidbus image build {manifest.name}`"
    )
    wrong = [damage(root, record, thorough=True) for record in own]
    return [f"{text}; {remedy}" for text in wrong if text]


def clean(root: Path, keep: set[Path], *, layers: bool) -> Cleaned:
    """Removes everything in the store but `keep`, and the layers only where asked to. The caller
    holds the store's locks. Raises OSError."""
    kinds = (*_KINDS, "layers") if layers else _KINDS
    removed = 0
    freed = 0
    for kind in (*kinds, *(() if layers else ("layers",))):
        folder = root / kind
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            abandoned = path.name.startswith(TEMPORARY)
            if path in keep or (kind not in kinds and not abandoned):
                continue
            freed += _bytes_of(path)
            removed += 1
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return Cleaned(removed, freed)


def _bytes_of(path: Path) -> int:
    total = path.lstat().st_size
    for folder, _, names in os.walk(path):
        total += sum(Path(folder, name).lstat().st_size for name in names)
    return total
