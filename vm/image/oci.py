"""Container images as guest file systems: an OCI layout on this host, merged into one layer.

A layout is a directory with `oci-layout`, `index.json` and `blobs/` (OCI image specification,
`image-layout.md`), or a tar archive of one; an archive of `docker save` is read too. Nothing is
pulled from anywhere.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.layers import layer_of_tar
from voidbus.vm.image.merge import LayerSource, merge_layers
from voidbus.vm.image.oci_layout import Layout, open_layout

MAX_LAYERS = 128
MAX_INDEX_DEPTH = 4
"""How many indexes may lie between `index.json` and a manifest."""

PLATFORM = ("linux", "amd64")

_REF_NAME = "org.opencontainers.image.ref.name"
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says of how its programs run (OCI image specification, `config.md`)."""

    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OciImage:
    """An image as a machine takes it. `digest` is its manifest's, `layer` a squashfs of its whole
    file system."""

    reference: str
    digest: str
    config: ImageConfig
    layer: Path


def unpack_image(root: Path, reference: str, at: str = "/") -> OciImage:
    """The image that `reference` names, in the store at `root`; its layer is made once. It has the
    image's files below the directory `at`.

    `reference` is a layout's directory or archive, with `:TAG` behind it where it holds several
    images. Raises ImageError: it is no local image, damaged, hostile or too large.
    """
    place = _place(at)
    path, tag = _local(reference)
    with open_layout(path) as layout:
        digest, manifest = _manifest(layout, tag, reference)
        config, diff_ids = _config(layout, manifest)
        layers = _layers(layout, manifest, diff_ids)
        layer = layer_of_tar(
            root,
            f"oci {digest} {place}".rstrip(),
            reference,
            lambda out: merge_layers(layers, out, at=place),
        )
    return OciImage(reference, digest, config, layer)


def _place(at: str) -> str:
    """The directory as archives have it. Raises ImageError."""
    path = PurePosixPath(at)
    if not path.is_absolute() or ".." in path.parts or "\0" in at or len(os.fsencode(at)) > 1024:
        raise ImageError(f"{at[:200]!r} is no directory for an image; give an absolute path")
    return os.fspath(path.relative_to("/")) if path != PurePosixPath("/") else ""


def _local(reference: str) -> tuple[Path, str]:
    """The path and the tag of a reference to something on this host."""
    whole = Path(reference.removeprefix("oci:").removeprefix("oci-archive:"))
    if whole.exists():
        return whole, ""
    before, colon, tag = str(whole).rpartition(":")
    if colon and "/" not in tag and Path(before).exists():
        return Path(before), tag
    if reference.startswith(("/", "./", "../", "oci:", "oci-archive:")):
        raise ImageError(f"the image {whole} does not exist; give the path of an OCI layout")
    raise ImageError(
        f"the image {reference!r} is not on this host, and voidbus does not pull images: fetch it "
        f"with `skopeo copy docker://{reference} oci:DIR` and set sandbox.image to DIR"
    )


# -- index and manifest --------------------------------------------------------------------


def _manifest(layout: Layout, tag: str, reference: str) -> tuple[str, dict[str, Any]]:
    """Digest and content of the manifest for this platform."""
    if layout.docker is not None:
        return layout.docker
    candidates = _descriptors(layout.index, "manifests", "index.json")
    if tag:
        candidates = [c for c in candidates if _name_of(c) in (tag, f"{reference}:{tag}")]
    for _ in range(MAX_INDEX_DEPTH):
        chosen = _choose(candidates, tag, reference)
        digest = str(chosen["digest"])
        document = layout.document(digest)
        if chosen.get("mediaType") not in _INDEXES and "manifests" not in document:
            return digest, document
        candidates = _descriptors(document, "manifests", digest)
        tag = ""
    raise ImageError(f"the image {reference} has indexes within indexes; it is damaged")


def _name_of(descriptor: dict[str, Any]) -> str:
    notes = descriptor.get("annotations")
    return str(notes.get(_REF_NAME, "")) if isinstance(notes, dict) else ""


def _choose(candidates: list[dict[str, Any]], tag: str, reference: str) -> dict[str, Any]:
    """The one descriptor for this platform. One that names no platform is for any."""
    fitting = [c for c in candidates if _platform(c) in (None, PLATFORM)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        tags = sorted({_name_of(c) for c in fitting} - {""})
        raise ImageError(
            f"{reference} holds {len(fitting)} images; name one by its tag: {reference}:TAG"
            + (f" (there is {', '.join(tags)[:300]})" if tags else "")
        )
    there = sorted({"/".join(_platform(c) or ()) for c in candidates})
    raise ImageError(
        f"{reference} has no image {'tagged ' + tag if tag else ''} for {'/'.join(PLATFORM)}"
        + (f" (there is {', '.join(there)[:300]})" if there else "")
        + f"; fetch it with `skopeo copy --override-arch {PLATFORM[1]} ...`"
    )


def _platform(descriptor: dict[str, Any]) -> tuple[str, str] | None:
    platform = descriptor.get("platform")
    if not isinstance(platform, dict):
        return None
    return str(platform.get("os")), str(platform.get("architecture"))


def _descriptors(document: dict[str, Any], key: str, what: str) -> list[dict[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not all(
        isinstance(each, dict) and _DIGEST.fullmatch(str(each.get("digest"))) for each in found
    ):
        raise ImageError(f"{what} has no sound list of {key}; the image is damaged")
    return found


# -- configuration and layers --------------------------------------------------------------


def _config(layout: Layout, manifest: dict[str, Any]) -> tuple[ImageConfig, list[str]]:
    """How programs run, and the digests of the layers uncompressed."""
    (descriptor,) = _descriptors({"config": [manifest.get("config")]}, "config", "the manifest")
    document = layout.document(str(descriptor["digest"]))
    given = document.get("config") or {}
    rootfs = document.get("rootfs") or {}
    try:
        env = tuple((k, v) for k, _, v in (str(e).partition("=") for e in given.get("Env") or ()))
        config = ImageConfig(
            env=env,
            working_dir=str(given.get("WorkingDir") or ""),
            user=str(given.get("User") or ""),
            entrypoint=tuple(str(word) for word in given.get("Entrypoint") or ()),
            command=tuple(str(word) for word in given.get("Cmd") or ()),
        )
        diff_ids = [str(each) for each in rootfs.get("diff_ids") or ()]
    except (AttributeError, TypeError) as error:
        raise ImageError(f"the image's configuration is damaged: {error}") from error
    if not all(_DIGEST.fullmatch(each) for each in diff_ids):
        raise ImageError("the image's configuration names layers by no sound digest")
    return config, diff_ids


def _layers(layout: Layout, manifest: dict[str, Any], diff_ids: list[str]) -> list[LayerSource]:
    """The layers, lowest first. What they unpack to is checked against `diff_ids`."""
    descriptors = _descriptors(manifest, "layers", "the manifest")
    if len(descriptors) > MAX_LAYERS or len(descriptors) != len(diff_ids):
        raise ImageError(
            f"the image has {len(descriptors)} layers and digests for {len(diff_ids)} (at most "
            f"{MAX_LAYERS}); it is damaged"
        )

    def source(number: int, digest: str, diff_id: str) -> LayerSource:
        return LayerSource(f"layer {number} ({digest[:19]})", lambda: layout.layer(digest, diff_id))

    pairs = zip(descriptors, diff_ids, strict=True)
    return [
        source(number, str(descriptor["digest"]), diff_id)
        for number, (descriptor, diff_id) in enumerate(pairs, 1)
    ]
