"""Reading an OCI layout: documents and blobs by digest, from a directory or a tar archive.

Whatever is read is checked against the digest it was asked for by.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.tar_source import BAD_ARCHIVE

MAX_DOCUMENT_BYTES = 4 << 20
"""What an index, manifest or configuration may have (registries take 4 MiB)."""

MAX_ARCHIVE_ENTRIES = 10_000
"""How many files a layout's archive may have; one has a few for each layer."""

_BLOCK = 1 << 18
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Files(Protocol):
    """Where a layout's files are."""

    def open(self, path: str) -> BinaryIO:
        """A file by its path in the layout. Raises FileNotFoundError and OSError."""


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, path: str) -> BinaryIO:
        if path.startswith("/") or ".." in path.split("/"):
            raise FileNotFoundError(f"{path!r} leads out of the layout")
        # A pipe would keep us waiting for its writer.
        file = os.open(self._root / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise FileNotFoundError(f"{path!r} is no file")
        return os.fdopen(file, "rb")


class _Archive:
    """The files of a tar archive, found by name and read where they lie."""

    def __init__(self, archive: tarfile.TarFile, name: str) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        while (member := archive.next()) is not None:
            if len(self._members) >= MAX_ARCHIVE_ENTRIES:
                raise ImageError(f"{name} holds too many files for an image; it is damaged")
            if member.isreg() or member.issym():
                self._members[member.name.removeprefix("./")] = member

    def open(self, path: str) -> BinaryIO:
        member = self._members.get(path)
        if member is not None and member.issym():
            # `docker save` links a layer that several images share; the link is within it.
            parts: list[str] = []
            for part in (*path.split("/")[:-1], *member.linkname.split("/")):
                if part == "..":
                    del parts[-1:]
                elif part not in ("", "."):
                    parts.append(part)
            member = self._members.get("/".join(parts))
        file = self._archive.extractfile(member) if member and member.isreg() else None
        if file is None:
            raise FileNotFoundError(f"there is no {path} in it")
        return cast("BinaryIO", file)


class Layout:
    """An image layout. `index` is its `index.json`; `docker` the digest and a manifest made from
    `manifest.json`, where it is an archive of `docker save` without the former."""

    def __init__(self, files: Files, name: str) -> None:
        self._files = files
        self._name = name
        self._paths: dict[str, str] = {}
        self.index: dict[str, Any] = {}
        self.docker: tuple[str, dict[str, Any]] | None = None
        try:
            self.index = self._json(self._read("index.json"), "index.json")
        except FileNotFoundError:
            self.docker = self._docker_manifest()

    def document(self, digest: str) -> dict[str, Any]:
        """The JSON object with that digest. Raises ImageError."""
        try:
            content = self._read(self._path(digest))
        except OSError as error:
            raise self._missing(digest, error) from error
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            raise self._damaged(digest)
        return self._json(content, digest)

    @contextmanager
    def layer(self, digest: str, diff_id: str) -> Iterator[BinaryIO]:
        """A layer's tar archive, uncompressed. When the block ends well, what is left is read,
        and all of it must have the digest `diff_id`; else ImageError is raised."""
        try:
            file = self._files.open(self._path(digest))
        except OSError as error:
            raise self._missing(digest, error) from error
        with file:
            magic = file.read(4)
            file.seek(0)
            if magic.startswith(_ZSTD):
                raise ImageError(
                    f"{self._name}: the layer {digest} is compressed with zstd, which is not "
                    "supported; copy it with `skopeo copy --dest-compress-format gzip ...`"
                )
            packed = magic.startswith(_GZIP)
            plain = gzip.GzipFile(fileobj=file, mode="rb") if packed else file
            hashed = _HashedStream(cast("BinaryIO", plain))
            try:
                yield cast("BinaryIO", hashed)
            except (zlib.error, gzip.BadGzipFile, EOFError) as error:
                raise ImageError(f"{self._name}: the layer {digest} is damaged: {error}") from error
            if hashed.digest() != diff_id:
                raise self._damaged(digest)

    def _path(self, digest: str) -> str:
        return self._paths.get(digest) or f"blobs/{digest.replace(':', '/', 1)}"

    def _read(self, path: str) -> bytes:
        with self._files.open(path) as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            raise ImageError(f"{self._name}: {path} is larger than an image's documents are")
        return content

    def _json(self, content: bytes, what: str) -> dict[str, Any]:
        try:
            document: Any = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ImageError(f"{self._name}: {what} is no JSON: {error}") from error
        if not isinstance(document, dict):
            raise ImageError(f"{self._name}: {what} is no JSON object; the image is damaged")
        return document

    def _docker_manifest(self) -> tuple[str, dict[str, Any]]:
        """The manifest of the only image of a `docker save`, as an OCI manifest would have it.
        Its layers are known by their diff ids alone."""
        try:
            listed: Any = json.loads(self._read("manifest.json"))
        except FileNotFoundError as error:
            raise ImageError(
                f"{self._name} is no OCI layout (no index.json); make one with `skopeo copy "
                "docker://NAME oci:DIR`"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ImageError(f"{self._name}: manifest.json is no JSON: {error}") from error
        if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
            raise ImageError(
                f"{self._name} holds no image or several; save one alone: `docker save NAME`"
            )
        config, layers = listed[0].get("Config"), listed[0].get("Layers")
        if not isinstance(config, str) or not isinstance(layers, list):
            raise ImageError(f"{self._name}: manifest.json names no configuration or no layers")
        try:
            content = self._read(config)
        except OSError as error:
            raise self._missing(config, error) from error
        seal = hashlib.sha256(content).hexdigest()
        # The configuration is known by its digest, and it has the digests of the layers.
        if _SHA256.search(config) is None or seal not in config:
            raise self._damaged(config)
        rootfs = self._json(content, config).get("rootfs")
        diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
            raise ImageError(f"{self._name}: the configuration does not fit the layers")
        self._paths = {f"sha256:{seal}": config}
        self._paths |= {str(d): str(p) for d, p in zip(diff_ids, layers, strict=True)}
        manifest = {
            "config": {"digest": f"sha256:{seal}"},
            "layers": [{"digest": diff_id} for diff_id in diff_ids],
        }
        return f"sha256:{seal}", manifest

    def _missing(self, digest: str, error: OSError) -> ImageError:
        return ImageError(f"{self._name}: {digest} can't be read: {error}; copy the image anew")

    def _damaged(self, digest: str) -> ImageError:
        return ImageError(
            f"{self._name}: what is stored as {digest} has another digest; copy the image anew"
        )


class _HashedStream(io.RawIOBase):
    """A stream whose whole content is known by its digest in the end."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._seal = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._source.read(size)
        self._seal.update(content)
        return content

    def digest(self) -> str:
        return f"sha256:{self._seal.hexdigest()}"


@contextmanager
def open_layout(path: Path) -> Iterator[Layout]:
    """The layout at `path`, a directory or a tar archive. Raises ImageError."""
    try:
        if path.is_dir():
            yield Layout(_Folder(path), str(path))
            return
        archive = tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    except BAD_ARCHIVE as error:
        raise ImageError(
            f"{path} is no OCI layout: neither a directory nor an uncompressed tar archive "
            f"({error})"
        ) from error
    except OSError as error:
        raise ImageError(f"{path} can't be read: {error.strerror}") from error
    with archive:
        try:
            files = _Archive(archive, str(path))
        except BAD_ARCHIVE as error:
            raise ImageError(f"{path} is a damaged archive: {error}") from error
        yield Layout(files, str(path))
