"""Merging layers: the OCI image specification's rules, and archives that mean harm."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kit import link, member, source, tar

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.merge import Limits, merge_layers
from voidbus.vm.image.tar_source import MAX_READ_BYTES


def merged(*layers: bytes, limits: Limits | None = None) -> dict[str, str]:
    """What the layers come to: by path, a file's text, `-> target`, `/` for directories."""
    out = io.BytesIO()
    sources = [source(layer, f"layer {number}") for number, layer in enumerate(layers, 1)]
    merge_layers(sources, out, limits)
    found: dict[str, str] = {}
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        for info in archive:
            assert info.name not in found
            if info.isdir():
                found[info.name] = "/"
            elif info.issym():
                found[info.name] = f"-> {info.linkname}"
            elif info.islnk():
                found[info.name] = f"= {info.linkname}"
            elif info.isreg():
                file = archive.extractfile(info)
                assert file is not None
                found[info.name] = file.read().decode("latin-1")
            else:
                found[info.name] = str(info.type)
    return found


def test_a_later_layer_replaces_what_an_earlier_one_has() -> None:
    below = tar(member("etc", None), member("etc/a", b"old"), member("etc/b", b"kept"))
    above = tar(member("./etc/a", b"new"))
    assert merged(below, above) == {"etc": "/", "etc/a": "new", "etc/b": "kept"}


def test_a_whiteout_takes_a_name_of_earlier_layers_away() -> None:
    below = tar(member("etc/a", b"1"), member("etc/d/x", b"2"), member("etc/b", b"3"))
    above = tar(member("etc/.wh.a"), member("etc/.wh.d"), member("etc/.wh.absent"))
    assert merged(below, above) == {"etc": "/", "etc/b": "3"}


def test_a_whiteout_spares_what_its_own_layer_brings() -> None:
    below = tar(member("d/old", b"1"))
    for above in (
        tar(member("d/new", b"2"), member(".wh.d")),
        tar(member(".wh.d"), member("d/new", b"2")),
    ):
        assert merged(below, above) == {"d": "/", "d/new": "2"}


def test_an_opaque_directory_hides_earlier_layers_wherever_its_mark_stands() -> None:
    below = tar(member("d/old", b"1"), member("d/sub/old", b"1"), member("e", b"kept"))
    for above in (
        tar(member("d/.wh..wh..opq"), member("d/new", b"2")),
        tar(member("d/new", b"2"), member("d/.wh..wh..opq")),
    ):
        assert merged(below, above) == {"d": "/", "d/new": "2", "e": "kept"}


def test_a_file_replaces_a_directory_with_all_in_it_and_the_other_way_round() -> None:
    below = tar(member("a/x", b"1"), member("b", b"2"))
    above = tar(member("a", b"file"), member("b", None), member("b/y", b"3"))
    assert merged(below, above) == {"a": "file", "b": "/", "b/y": "3"}


def test_a_hard_link_keeps_the_content_when_its_target_is_replaced() -> None:
    below = tar(member("a", b"first"), link("b", "a", hard=True))
    assert merged(below) == {"a": "first", "b": "= a"}
    assert merged(below, tar(member("a", b"second"))) == {"a": "second", "b": "first"}
    assert merged(below, tar(member(".wh.a"))) == {"b": "first"}


def test_paths_lead_through_links_inside_the_image_only() -> None:
    layer = tar(
        member("usr/lib", None),
        link("lib", "usr/lib"),
        link("up", "../../../../usr"),
        link("abs", "/usr"),
        member("lib/a", b"1"),
        member("up/b", b"2"),
        member("abs/c", b"3"),
    )
    found = merged(layer)
    assert found["usr/lib/a"] == "1"
    assert found["usr/b"] == "2"
    assert found["usr/c"] == "3"
    assert found["lib"] == "-> usr/lib"


def test_devices_are_left_out_and_pipes_kept() -> None:
    layer = tar(
        member("dev/sda", None, type=tarfile.BLKTYPE, devmajor=8),
        member("dev/mem", None, type=tarfile.CHRTYPE, devmajor=1),
        member("run/pipe", None, type=tarfile.FIFOTYPE),
    )
    assert merged(layer) == {"dev": "/", "run": "/", "run/pipe": str(tarfile.FIFOTYPE)}


def test_owners_modes_and_times_are_kept_and_attributes_are_not() -> None:
    layer = tar(
        member("a", b"x", uid=1000, gid=70000, mode=0o104755, mtime=1234.5, uname="me"),
        member("b", b"x", uid=1 << 40, mtime=-5, pax_headers={"SCHILY.xattr.user.x": "y"}),
    )
    out = io.BytesIO()
    merge_layers([source(layer)], out)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        a, b = archive.getmembers()
    assert (a.uid, a.gid, a.mode, a.mtime, a.uname) == (1000, 70000, 0o4755, 1234, "")
    assert (b.uid, b.mtime, b.pax_headers) == (0, 0, {})


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (tar(member("../x")), "leads out of the image"),
        (tar(member("a/../../x")), "leads out of the image"),
        (tar(link("a", "../x", hard=True)), "leads out of the image"),
        (tar(link("a", "/etc/passwd", hard=True)), "no file of the image"),
        (tar(member("d", None), link("a", "d", hard=True)), "no file of the image"),
        (tar(link("a", "a", hard=True)), "no file of the image"),
        (tar(member("a", b""), member("a/b")), "used as a directory"),
        (tar(link("a", "b"), link("b", "a"), member("a/x")), "circle"),
        (tar(member("/".join("d" * 200))), "too deep"),
        (tar(member("x" * 300)), "too long a name"),
        (tar(member(".wh..")), "whiteout of nothing"),
        (tar(link("a", "")), "leads nowhere"),
        (tar(member("a", None, type=b"Z")), "of a kind"),
        (b"no archive at all" * 100, "no sound archive"),
        (tar(member("a", b"x" * 5000))[:3000], "no sound archive"),
    ],
)
def test_an_archive_that_is_bad_or_means_harm_is_refused(layer: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        merged(layer)
    assert "layer 1" in str(caught.value)


def test_links_that_climb_make_no_directory_deeper_than_the_limit() -> None:
    layer = tar(*(link("/".join(["d"] * n) + "/l", "d/" * 100) for n in range(1, 60)))
    deep = tar(member("d/l/l/l/l/l/l/x", b""))
    with pytest.raises(ImageError, match=r"too deep|circle|used as a directory"):
        merged(layer, deep, limits=Limits(depth=100))


@pytest.mark.parametrize(
    "limits",
    [Limits(entries=20), Limits(bytes=20_000), Limits(name_bytes=50)],
    ids=["entries", "bytes", "names"],
)
def test_an_image_over_a_limit_is_refused(limits: Limits) -> None:
    layer = tar(*(member(f"d{n}/f", b"x" * 1000) for n in range(30)))
    assert len(merged(layer)) == 60
    with pytest.raises(ImageError, match=r"larger than an image may be|unpacks to more than"):
        merged(layer, limits=limits)


def test_a_header_that_claims_to_be_huge_is_not_read_into_memory() -> None:
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    header.size = 1 << 40
    layer = header.tobuf(tarfile.GNU_FORMAT) + bytes(MAX_READ_BYTES)
    with pytest.raises(ImageError, match="a header claims"):
        merged(layer)


def test_many_headers_before_one_file_end_in_an_error_and_not_in_a_crash() -> None:
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    record = b"11 path=ab\n"
    header.size = len(record)
    one = header.tobuf() + record + bytes(512 - len(record))
    with pytest.raises(ImageError, match="nested too deeply"):
        merged(one * 5000)


# -- against a simple model -------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@dataclass(frozen=True)
class Change:
    """What a layer says of a path: `file`, `dir`, `gone` or `opaque`."""

    kind: str
    path: str
    text: str


CHANGES = st.builds(
    Change, st.sampled_from(["file", "dir", "gone", "opaque"]), PATHS, st.text("xyz", max_size=3)
)


def sound(changes: list[Change]) -> list[Change]:
    """Changes that make a layer as tools make them: each path once, nothing below a file."""
    kept: list[Change] = []
    for change in sorted(changes, key=lambda c: c.path):
        above = {c.path for c in kept if c.kind in ("file", "gone")}
        parents = change.path.split("/")
        if any("/".join(parents[:n]) in above for n in range(1, len(parents) + 1)):
            continue
        if any(c.path == change.path for c in kept):
            continue
        kept.append(change)
    return kept


def as_layer(changes: list[Change]) -> bytes:
    members = []
    for change in changes:
        folder, _, name = change.path.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        if change.kind == "file":
            members.append(member(change.path, change.text.encode()))
        elif change.kind == "gone":
            members.append(member(f"{prefix}.wh.{name}"))
        else:
            members.append(member(change.path, None))
            if change.kind == "opaque":
                members.append(member(f"{change.path}/.wh..wh..opq"))
    return tar(*members)


def apply(tree: dict[str, str], changes: list[Change]) -> None:
    """The specification's rules over a plain mapping, as slowly as they are simple: first what
    the layer takes away, then what it brings."""

    def drop(path: str, *, itself: bool = True) -> None:
        for each in [p for p in tree if p.startswith(f"{path}/") or (itself and p == path)]:
            del tree[each]

    for change in changes:
        if change.kind == "gone":
            drop(change.path)
        elif change.kind == "opaque":
            drop(change.path, itself=False)
    for change in changes:
        parts = change.path.split("/")
        for n in range(1, len(parts)):
            parent = "/".join(parts[:n])
            if tree.get(parent, "/") == "/":
                tree[parent] = "/"
        if change.kind == "file":
            drop(change.path)
            tree[change.path] = change.text
        elif change.kind in ("dir", "opaque"):
            if tree.get(change.path, "/") != "/":
                drop(change.path)
            tree[change.path] = "/"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(CHANGES, max_size=6).map(sound), min_size=1, max_size=4))
def test_merging_agrees_with_the_rules_applied_one_by_one(
    layers: list[list[Change]],
) -> None:
    expected: dict[str, str] = {}
    archives = []
    for changes in layers:
        made = {change.path for change in changes if change.kind in ("dir", "opaque")}
        files = {path for path, text in expected.items() if text != "/"} - made
        # What leads through a file is refused, which has a test of its own.
        fitting = [c for c in changes if not any(c.path.startswith(f"{f}/") for f in files)]
        apply(expected, fitting)
        archives.append(as_layer(fitting))
    assert merged(*archives) == expected


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2048), st.integers(0, 4000), st.integers(0, 255))
def test_no_bytes_do_worse_than_an_image_error(noise: bytes, at: int, value: int) -> None:
    good = bytearray(tar(member("a/b", b"x" * 600), link("c", "a"), link("d", "a/b", hard=True)))
    good[at % len(good)] = value
    for layer in (noise, bytes(good), bytes(good) + noise, bytes(good[: at % len(good)])):
        try:
            merged(layer)
        except ImageError:
            continue
