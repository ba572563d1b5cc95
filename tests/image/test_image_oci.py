"""Images in OCI layouts: found, checked by their digests, merged into one layer."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kit import LayoutBuilder, link, member, sha256, tar

from voidbus.vm.image import oci
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.oci import ImageConfig, OciImage, unpack_image

LAYERS = (
    tar(member("etc/name", b"below"), member("etc/gone", b"x"), link("bin", "usr/bin")),
    tar(member("etc/name", b"above"), member("etc/.wh.gone"), member("bin/tool", b"t")),
)
CONFIG = {
    "Env": ["PATH=/usr/bin:/bin", "EMPTY=", "A=b=c"],
    "WorkingDir": "/srv",
    "User": "1000:1000",
    "Entrypoint": ["/bin/tool"],
    "Cmd": ["--help"],
}


@pytest.fixture
def layout(tmp_path: Path) -> LayoutBuilder:
    return LayoutBuilder(tmp_path / "layout")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def archived(folder: Path, target: Path) -> Path:
    """The layout as one tar archive, as `skopeo copy ... oci-archive:` makes it."""
    with tarfile.open(target, "w") as archive:
        archive.add(folder, "./")
    return target


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Instead of a squashfs: what the last image came to, by path."""
    found: dict[str, str] = {}

    def keep(root: Path, identity: str, name: str, write: Any) -> Path:
        out = io.BytesIO()
        write(out)
        out.seek(0)
        found.clear()
        with tarfile.open(fileobj=out) as archive:
            for info in archive:
                file = archive.extractfile(info) if info.isreg() else None
                found[info.name] = file.read().decode() if file else info.linkname or "/"
        return root / identity

    monkeypatch.setattr(oci, "layer_of_tar", keep)
    return found


WHOLE = {
    "bin": "usr/bin",
    "etc": "/",
    "etc/name": "above",
    "usr": "/",
    "usr/bin": "/",
    "usr/bin/tool": "t",
}


@pytest.mark.needs("squashfs")
def test_an_image_becomes_one_squashfs_that_is_made_once(
    layout: LayoutBuilder, store: Path, tmp_path: Path
) -> None:
    (layout.root).mkdir()
    layout.write_index(layout.image(LAYERS, config=CONFIG))
    image = unpack_image(store, str(layout.root))
    assert image.config == ImageConfig(
        (("PATH", "/usr/bin:/bin"), ("EMPTY", ""), ("A", "b=c")),
        "/srv",
        "1000:1000",
        ("/bin/tool",),
        ("--help",),
    )
    target = tmp_path / "out"
    subprocess.run(
        ["unsquashfs", "-quiet", "-no-progress", "-d", str(target), str(image.layer)],
        check=True,
        timeout=30,
        stdout=subprocess.DEVNULL,
    )
    assert (target / "etc/name").read_text() == "above"
    assert sorted(p.name for p in (target / "etc").iterdir()) == ["name"]
    again = unpack_image(store, str(layout.root))
    assert again == image
    assert [p.name for p in (store / "layers").glob("*.squashfs")] == [image.layer.name]


def test_an_image_may_lie_below_a_directory(
    layout: LayoutBuilder, store: Path, unpacked: dict[str, str]
) -> None:
    layout.write_index(layout.image(LAYERS))
    unpack_image(store, str(layout.root), "/opt/tools/")
    below = {f"opt/tools/{name}": content for name, content in WHOLE.items()}
    folders = {name: unpacked[name] for name in ("opt", "opt/tools")}
    assert unpacked == below | folders


@pytest.mark.parametrize("at", ["tools", "", "/a/../../b", "/a\0b", "/" + "x" * 2000])
def test_what_is_no_directory_for_an_image_is_refused(
    layout: LayoutBuilder, store: Path, at: str
) -> None:
    layout.write_index(layout.image(LAYERS))
    with pytest.raises(ImageError, match="is no directory for an image"):
        unpack_image(store, str(layout.root), at)


@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
def test_a_layout_is_read_as_a_directory_and_as_an_archive(
    layout: LayoutBuilder, store: Path, tmp_path: Path, packed: bool, unpacked: dict[str, str]
) -> None:
    layout.write_index(layout.image(LAYERS, packed=packed))
    first = unpack_image(store, str(layout.root))
    assert unpacked == WHOLE
    archive = archived(layout.root, tmp_path / "image.tar")
    second = unpack_image(store, f"oci-archive:{archive}")
    assert unpacked == WHOLE
    assert first.digest == second.digest


def test_the_image_for_this_platform_is_taken_of_several(
    layout: LayoutBuilder, store: Path, unpacked: dict[str, str]
) -> None:
    arm = layout.image([tar(member("arm"))]) | {"platform": {"os": "linux", "architecture": "arm"}}
    ours = layout.image(LAYERS) | {"platform": {"os": "linux", "architecture": "amd64"}}
    inner = layout.document({"manifests": [arm, ours]})
    layout.write_index({"mediaType": oci._INDEXES[0], "digest": inner})
    unpack_image(store, str(layout.root))
    assert unpacked == WHOLE
    layout.write_index(arm)
    with pytest.raises(ImageError, match=r"has no image  ?for linux/amd64 \(there is linux/arm\)"):
        unpack_image(store, str(layout.root))


def test_a_tag_chooses_among_images(
    layout: LayoutBuilder, store: Path, unpacked: dict[str, str]
) -> None:
    tagged = [
        layout.image([tar(member(name))]) | {"annotations": {oci._REF_NAME: name}}
        for name in ("one", "two")
    ]
    layout.write_index(*tagged)
    unpack_image(store, f"oci:{layout.root}:two")
    assert list(unpacked) == ["two"]
    with pytest.raises(ImageError, match=r"holds 2 images; .*there is one, two"):
        unpack_image(store, str(layout.root))
    with pytest.raises(ImageError, match="no image tagged three"):
        unpack_image(store, f"{layout.root}:three")


@pytest.mark.parametrize("linked", [False, True])
def test_an_archive_of_docker_save_is_read(
    store: Path, tmp_path: Path, linked: bool, unpacked: dict[str, str]
) -> None:
    config = json.dumps(
        {"config": CONFIG, "rootfs": {"diff_ids": [sha256(layer) for layer in LAYERS]}}
    ).encode()
    name = f"{sha256(config)[7:]}.json"
    manifest = [{"Config": name, "RepoTags": ["x:1"], "Layers": ["a/layer.tar", "b/layer.tar"]}]
    first = (
        (link("a/layer.tar", "../c/layer.tar"), member("c/layer.tar", LAYERS[0]))
        if linked
        else (member("a/layer.tar", LAYERS[0]),)
    )
    path = tmp_path / "saved.tar"
    path.write_bytes(
        tar(
            *first,
            member("b/layer.tar", LAYERS[1]),
            member(name, config),
            member("manifest.json", json.dumps(manifest).encode()),
        )
    )
    image = unpack_image(store, str(path))
    assert unpacked == WHOLE
    assert (image.digest, image.config.user) == (sha256(config), "1000:1000")


# -- what is refused ---------------------------------------------------------------------------


def test_a_name_that_is_not_on_this_host_is_refused_with_the_way_to_get_it(store: Path) -> None:
    with pytest.raises(ImageError, match=r"skopeo copy docker://alpine:3.19 oci:DIR"):
        unpack_image(store, "alpine:3.19")
    with pytest.raises(ImageError, match="/absent does not exist"):
        unpack_image(store, "/absent")


def test_a_layer_whose_content_is_another_is_refused(
    layout: LayoutBuilder, store: Path, unpacked: dict[str, str]
) -> None:
    layout.write_index(layout.image(LAYERS, packed=False))
    blob = layout.root / "blobs" / sha256(LAYERS[1]).replace(":", "/")
    blob.write_bytes(LAYERS[1].replace(b"above", b"ABOVE"))
    with pytest.raises(ImageError, match="has another digest"):
        unpack_image(store, str(layout.root))
    assert unpacked == {}


@pytest.mark.parametrize("name", ["manifest", "config"])
def test_a_document_whose_content_is_another_is_refused(
    layout: LayoutBuilder, store: Path, name: str
) -> None:
    descriptor = layout.image(LAYERS)
    layout.write_index(descriptor)
    digest = str(descriptor["digest"])
    if name == "config":
        path = layout.root / "blobs" / digest.replace(":", "/")
        digest = json.loads(path.read_text())["config"]["digest"]
    path = layout.root / "blobs" / digest.replace(":", "/")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ImageError, match="has another digest"):
        unpack_image(store, str(layout.root))


def test_a_blob_that_is_missing_is_named(layout: LayoutBuilder, store: Path) -> None:
    layout.write_index(layout.image(LAYERS, packed=False))
    (layout.root / "blobs" / sha256(LAYERS[0]).replace(":", "/")).unlink()
    with pytest.raises(ImageError, match=f"{sha256(LAYERS[0])} can't be read"):
        squash(store, layout.root)


def squash(store: Path, path: Path) -> OciImage:
    """Unpacks without making a squashfs."""

    def write(root: Path, identity: str, name: str, write: Any) -> Path:
        write(io.BytesIO())
        return root / identity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oci, "layer_of_tar", write)
        return unpack_image(store, str(path))


def test_a_layer_cut_off_in_its_compression_is_refused(layout: LayoutBuilder, store: Path) -> None:
    layout.write_index(layout.image(LAYERS))
    for blob in (layout.root / "blobs/sha256").iterdir():
        content = blob.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            blob.write_bytes(content[:-20])
    with pytest.raises(ImageError, match=r"no sound archive|damaged"):
        squash(store, layout.root)


def test_a_layer_packed_with_zstd_is_refused_with_a_remedy(
    layout: LayoutBuilder, store: Path
) -> None:
    content = b"\x28\xb5\x2f\xfd" + bytes(64)
    layout.write_index(layout.image([content], packed=False))
    with pytest.raises(ImageError, match="--dest-compress-format gzip"):
        squash(store, layout.root)


def test_files_that_are_none_are_not_waited_for(layout: LayoutBuilder, store: Path) -> None:
    layout.write_index(layout.image(LAYERS))
    (layout.root / "index.json").unlink()
    os.mkfifo(layout.root / "index.json")
    with pytest.raises(ImageError, match="no OCI layout"):
        unpack_image(store, str(layout.root))


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        '{"manifests": 5}',
        '{"manifests": [{}]}',
        '{"manifests": [{"digest": "sha256:../../../../etc/passwd"}]}',
        '{"manifests": [{"digest": "md5:00"}]}',
        '{"manifests": []}',
        "[" * 100_000,
    ],
)
def test_an_index_that_is_no_index_is_refused(
    layout: LayoutBuilder, store: Path, index: str
) -> None:
    layout.write_index()
    (layout.root / "index.json").write_text(index)
    with pytest.raises(ImageError):
        unpack_image(store, str(layout.root))


def test_indexes_that_lead_nowhere_end(layout: LayoutBuilder, store: Path) -> None:
    digest = str(layout.image(LAYERS)["digest"])
    for _ in range(10):
        digest = layout.document({"manifests": [{"digest": digest}]})
    layout.write_index({"digest": digest})
    with pytest.raises(ImageError, match="indexes within indexes"):
        unpack_image(store, str(layout.root))


def test_what_is_neither_a_layout_nor_an_archive_is_refused(tmp_path: Path, store: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(ImageError, match="neither a directory nor an uncompressed tar archive"):
        unpack_image(store, str(file))
    with pytest.raises(ImageError, match="no OCI layout"):
        unpack_image(store, str(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "config": JSON
            | st.fixed_dictionaries(
                {}, optional={"Env": JSON, "User": JSON, "Entrypoint": JSON, "Cmd": JSON}
            ),
            "rootfs": JSON | st.fixed_dictionaries({}, optional={"diff_ids": JSON}),
        },
    ),
    st.fixed_dictionaries({}, optional={"layers": JSON}),
)
def test_no_document_does_worse_than_an_image_error(
    tmp_path_factory: pytest.TempPathFactory, config: Any, manifest: Any
) -> None:
    layout = LayoutBuilder(tmp_path_factory.mktemp("layout"))
    digest = layout.document(config)
    layout.write_index(
        {"digest": layout.document({"config": {"digest": digest}, "layers": []} | manifest)}
    )
    try:
        squash(layout.root / "store", layout.root)
    except ImageError:
        return


def test_nothing_unpacked_can_reach_the_host(layout: LayoutBuilder, tmp_path: Path) -> None:
    """The merge is of names only; this shows it with an archive that tries."""
    victim = tmp_path / "victim"
    victim.write_text("safe")
    layer = tar(link("out", str(tmp_path)), member("out/victim", b"taken"))
    layout.write_index(layout.image([layer]))
    squash(tmp_path / "store", layout.root)
    assert victim.read_text() == "safe"
