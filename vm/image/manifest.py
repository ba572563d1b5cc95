"""What an image is made of, as it is written beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voidbus.vm.image.fault import ImageError

FORMAT = 1
"""The manifest's own version; a manifest of another one is not read."""


@dataclass(frozen=True, slots=True)
class Part:
    """One ingredient: a distribution package, or the product's own files.

    `version` is the package's, or voidbus's own. `sha256` is of the package's file (of the
    product's files, taken together), `size` what was taken of it for the guest, in bytes, before
    Python's sources were compiled.
    """

    name: str
    version: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the store. `path` is relative to the store's root, `size` in bytes."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image holds and where its files are.

    `kernel_bytes` is the memory the kernel's segments take when loaded (ELF `p_memsz`),
    `unpacked_bytes` what the initramfs takes once it is unpacked. `programs` are the absolute
    paths of what a guest can count on; `modules` the kernel modules by name, each after those it
    needs, `built_in` those of the recipe's that the kernel has in it. `files` are the kernel and
    the initramfs, in this order.
    """

    name: str
    kernel_release: str = ""
    kernel_bytes: int = 0
    unpacked_bytes: int = 0
    parts: tuple[Part, ...] = ()
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    files: tuple[StoredFile, ...] = ()
    built_in: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The manifest as JSON text, the same for the same content."""
        document = {"format": FORMAT, **self._fields()}
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    def _fields(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kernel_release": self.kernel_release,
            "kernel_bytes": self.kernel_bytes,
            "unpacked_bytes": self.unpacked_bytes,
            "parts": [
                {"name": p.name, "version": p.version, "sha256": p.sha256, "size": p.size}
                for p in self.parts
            ],
            "programs": list(self.programs),
            "modules": list(self.modules),
            "built_in": list(self.built_in),
            "files": [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in self.files],
        }

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote. Raises ValueError where it is anything else."""
        document: Any = json.loads(text)
        try:
            if document["format"] != FORMAT:
                raise ValueError(f"format {document['format']!r} is not {FORMAT}")
            return cls(
                name=str(document["name"]),
                kernel_release=str(document["kernel_release"]),
                kernel_bytes=int(document["kernel_bytes"]),
                unpacked_bytes=int(document["unpacked_bytes"]),
                parts=tuple(
                    Part(str(p["name"]), str(p["version"]), str(p["sha256"]), int(p["size"]))
                    for p in document["parts"]
                ),
                programs=tuple(str(program) for program in document["programs"]),
                modules=tuple(str(module) for module in document["modules"]),
                # Manifests of images that were built before it was written have none.
                built_in=tuple(str(module) for module in document.get("built_in", ())),
                files=tuple(
                    StoredFile(str(f["path"]), str(f["sha256"]), int(f["size"]))
                    for f in document["files"]
                ),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"it lacks or misstates {error}") from error


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file. Raises ImageError where it can't be read or is damaged."""
    try:
        return Manifest.from_json(path.read_text())
    except FileNotFoundError as error:
        raise ImageError(f"{path} is missing; run `voidbus image build`") from error
    except (OSError, ValueError) as error:
        raise ImageError(
            f"{path} can't be read: {error}; remove it and run `voidbus image build`"
        ) from error
