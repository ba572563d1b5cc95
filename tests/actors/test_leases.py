"""Leases: what a dead run process held is found and removed, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voidbus.actors.leases import LeaseFile, Leftovers, reap
from voidbus.actors.runtime.process import ProcessIdentity, current_identity, identity_of

PATIENCE = 20.0


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def leases(run_dir: Path, *items: ProcessIdentity | Path) -> Path:
    path = run_dir / "leases.jsonl"
    file = LeaseFile(path)
    for item in items:
        if isinstance(item, Path):
            file.path(item)
        else:
            file.process(item)
    file.close()
    return path


def test_what_was_leased_is_killed_and_removed(
    run_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    machine = run_dir / "machine"
    (machine / "deep/er").mkdir(parents=True)
    (run_dir / "file").write_text("x")
    file = leases(run_dir, identity_of(sleeper.pid), machine, run_dir / "file")
    assert reap(file, run_dir) == Leftovers(processes_killed=1, paths_removed=2)
    assert sleeper.wait(PATIENCE) == -9
    assert not machine.exists()
    assert reap(file, run_dir) == Leftovers(0, 0), "again is fine"


def test_leases_are_readable_by_their_owner_only_and_survive_a_second_opening(
    run_dir: Path,
) -> None:
    path = leases(run_dir, run_dir / "a")
    leases(run_dir, run_dir / "b")
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text().splitlines()) == 2


def test_a_closed_lease_file_writes_into_nobody_elses_descriptor(run_dir: Path) -> None:
    file = LeaseFile(run_dir / "leases.jsonl")
    file.close()
    file.close()
    with (run_dir / "other").open("wb"), pytest.raises(ValueError, match="closed"):
        file.path(run_dir)
    assert (run_dir / "other").read_bytes() == b""


def test_another_process_of_the_same_pid_is_left_alone(
    run_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    identity = identity_of(sleeper.pid)
    file = leases(run_dir, ProcessIdentity(identity.pid, identity.start_time - 1))
    assert reap(file, run_dir).processes_killed == 0
    assert sleeper.poll() is None


def test_nothing_outside_the_runs_directory_is_removed(run_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "data").write_text("x")
    (run_dir / "link").symlink_to(outside)
    file = leases(
        run_dir,
        outside,
        run_dir / "../precious",
        run_dir / "link/data",  # below by name, outside by nature
        run_dir,
        Path("/"),
        Path("relative"),
    )
    assert reap(file, run_dir).paths_removed == 0
    assert (outside / "data").exists()
    assert run_dir.exists()


def test_a_leased_symlink_is_removed_and_not_what_it_leads_to(
    run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "target").mkdir()
    (run_dir / "link").symlink_to(tmp_path / "target")
    (run_dir / "dangling").symlink_to(tmp_path / "nothing")
    file = leases(run_dir, run_dir / "link", run_dir / "dangling")
    assert reap(file, run_dir).paths_removed == 2
    assert (tmp_path / "target").exists()
    assert not os.path.lexists(run_dir / "dangling")


def test_a_line_cut_short_does_not_keep_the_others_from_being_reaped(run_dir: Path) -> None:
    (run_dir / "a").mkdir()
    (run_dir / "b").mkdir()
    path = leases(run_dir, run_dir / "a")
    with path.open("ab") as file:
        file.write(b'{"pid": 12\n')
        file.write(json.dumps({"path": str(run_dir / "b")}).encode() + b"\n")
        file.write(b'{"path": "/')
    assert reap(path, run_dir).paths_removed == 2


def test_what_cannot_be_removed_does_not_keep_the_run_from_ending(run_dir: Path) -> None:
    (run_dir / "ok").mkdir()
    file = leases(run_dir, run_dir / ("x" * 300), run_dir / "ok")
    assert reap(file, run_dir).paths_removed == 1


def test_no_lease_file_is_nothing_to_reap(run_dir: Path) -> None:
    assert reap(run_dir / "leases.jsonl", run_dir) == Leftovers(0, 0)


# No pid of a living process, for this kills what it finds.
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=5),
    st.integers(max_value=-1),
    st.just(10**30),
    st.lists(st.integers(), max_size=2),
)
odd_leases = st.one_of(
    st.binary(max_size=30),
    st.dictionaries(st.sampled_from(["pid", "start_time", "path"]), odd_values).map(
        lambda d: json.dumps(d).encode()
    ),
    odd_values.map(lambda v: json.dumps(v).encode()),
    st.text(max_size=8).map(lambda t: json.dumps({"path": "/nowhere/" + t}).encode()),
    st.just(b"[" * 100_000),
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(odd_leases, max_size=4))
def test_any_lease_file_is_read_without_an_error(run_dir: Path, lines: list[bytes]) -> None:
    path = run_dir / "odd.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert reap(path, run_dir).processes_killed == 0
    assert run_dir.exists()
    assert identity_of(os.getpid()) == current_identity()
