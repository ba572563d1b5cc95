"""Files by content: kept once, read in parts, and removed only when nobody may want them."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from read_only_kit import read_only

from voidbus.actors.artifact_store import ArtifactStore, unlisted_before
from voidbus.actors.messages.file_content import media_type_of


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(content=st.binary(max_size=5000), offset=st.integers(0, 6000), limit=st.integers(0, 6000))
def test_what_was_put_is_read_whole_or_in_part(
    store: ArtifactStore, content: bytes, offset: int, limit: int
) -> None:
    digest = store.put(content)
    assert digest == hashlib.sha256(content).hexdigest()
    assert store.read(digest, offset, limit) == content[offset : offset + limit]


def test_the_same_content_is_one_file_that_only_its_owner_reads(
    store: ArtifactStore, tmp_path: Path
) -> None:
    assert store.put(b"x") == store.put(b"x")
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n"])
def test_what_is_no_digest_is_not_there(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(FileNotFoundError):
        store.read(digest, 0, 1)


def age(tmp_path: Path, seconds: float) -> None:
    for path in tmp_path.rglob("*"):
        if path.is_file():
            then = time.time() - seconds
            os.utime(path, (then, then))


def test_only_what_is_old_and_was_not_put_again_is_removed(
    store: ArtifactStore, tmp_path: Path
) -> None:
    old, again = store.put(b"old"), store.put(b"again")
    age(tmp_path, 7200)
    fresh = store.put(b"fresh")
    before = time.time() - 3600
    assert sorted(store.older_than(before)) == sorted([old, again])
    store.put(b"again")
    assert store.remove([old, again, fresh], before) == 3
    assert store.read(again, 0, 9) == b"again"
    assert store.read(fresh, 0, 9) == b"fresh"
    with pytest.raises(FileNotFoundError):
        store.read(old, 0, 1)


def test_what_a_killed_writer_left_half_written_is_removed(
    store: ArtifactStore, tmp_path: Path
) -> None:
    digest = store.put(b"x")
    half = tmp_path / "artifacts" / digest[:2] / f".{digest[2:]}.0123"
    half.write_bytes(b"ha")
    age(tmp_path, 7200)
    assert store.older_than(time.time() - 3600) == [digest]
    assert not half.exists()


@pytest.mark.needs("mount")
def test_a_full_disk_is_named_with_the_remedy(tmp_path: Path) -> None:
    import subprocess

    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    try:
        with pytest.raises(OSError, match="free space there"):
            ArtifactStore(folder).put(b"x" * 200_000)
        assert not [path for path in folder.rglob("*") if path.is_file()]
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.needs("mount")
def test_a_read_only_disk_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "frozen"
    folder.mkdir()
    with read_only(folder), pytest.raises(OSError, match="Read-only file system; make it writable"):
        ArtifactStore(folder).put(b"x")


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b'{"a": 1}', "application/json"),
        (b"null", "application/json"),
        (b'"abc"', "application/json"),
        (b"42", "application/json"),
        (b' {"a":1}\n', "application/json"),
        (b"NaN", "text/plain"),
        (b'{"a": Infinity}', "text/plain"),
        ('{"a": 1}'.encode("utf-16"), "application/octet-stream"),
        (b"words", "text/plain"),
        (b"\xff\x00", "application/octet-stream"),
        (b"[" * 100_000, "text/plain"),
        (b" " * (5 * 1024 * 1024), "application/octet-stream"),
    ],
)
def test_what_a_file_is_is_told_by_its_content(content: bytes, media_type: str) -> None:
    assert media_type_of(content) == media_type


def test_nothing_a_run_that_goes_on_may_list_is_removed() -> None:
    now = time.time()
    assert now - 3600 <= unlisted_before([]) <= time.time() - 3600
    assert unlisted_before(["2020-01-01T00:00:00.123456789Z"]) == 1577836800.0
