"""Small images, layers and layouts for tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from voidbus.vm.image.merge import LayerSource


def member(path: str, content: bytes | None = b"", **attributes: Any) -> tuple[Any, bytes]:
    """A member of a tar archive: a file, or with content None what `type` says."""
    info = tarfile.TarInfo(path)
    info.size = len(content or b"")
    if content is None:
        info.type = tarfile.DIRTYPE
        info.mode = 0o755
    for name, value in attributes.items():
        setattr(info, name, value)
    return info, content or b""


def link(path: str, target: str, *, hard: bool = False) -> tuple[Any, bytes]:
    kind = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    return member(path, None, type=kind, linkname=target)


def tar(*members: tuple[Any, bytes]) -> bytes:
    """The bytes of a tar archive of these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def source(content: bytes, name: str = "layer") -> LayerSource:
    def opened() -> AbstractContextManager[BinaryIO]:
        return nullcontext(cast("BinaryIO", io.BytesIO(content)))

    return LayerSource(name, opened)


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class LayoutBuilder:
    """Writes an OCI layout below `root`, blob by blob."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifests: list[dict[str, Any]] = []

    def blob(self, content: bytes) -> str:
        digest = sha256(content)
        path = self.root / "blobs" / digest.replace(":", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return digest

    def document(self, document: Any) -> str:
        return self.blob(json.dumps(document).encode())

    def image(
        self, layers: Iterable[bytes], *, config: Any = None, packed: bool = True
    ) -> dict[str, Any]:
        """Adds an image of these layers; its descriptor."""
        layers = list(layers)
        config_digest = self.document(
            {
                "config": config or {},
                "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
            }
        )
        blobs = [gzip.compress(layer, mtime=0) if packed else layer for layer in layers]
        manifest = {
            "schemaVersion": 2,
            "config": {"digest": config_digest},
            "layers": [{"digest": self.blob(blob)} for blob in blobs],
        }
        return {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": self.document(manifest),
        }

    def write_index(self, *descriptors: dict[str, Any]) -> Path:
        """Writes `index.json` naming these; the layout's root."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (self.root / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "manifests": list(descriptors)})
        )
        return self.root
