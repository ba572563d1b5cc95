"""`voidbus artifacts` and `voidbus prune`, on a real supervisor."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from supervisor_kit import Client, Supervisor, running_supervisor

VOIDBUS = [sys.executable, "-P", "-m", "voidbus.cli.main"]
BIG = 3 * 1024 * 1024 + 5


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    with running_supervisor() as running:
        yield running


@pytest.fixture(scope="module")
def client(supervisor: Supervisor) -> Iterator[Client]:
    with supervisor.connect() as connected:
        yield connected


Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def voidbus(supervisor: Supervisor) -> Run:
    def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
        command = [*VOIDBUS, "--state-dir", str(supervisor.state_dir), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, timeout=60, check=False)

    return run


@pytest.fixture(scope="module")
def run_id(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A workflow that leaves structured output, a big file, and one it does not write."""
    document = {"status": "ok", "artifacts": [{"name": "big.bin"}, {"name": "gone.txt"}]}
    script = (
        f"head -c {BIG} /dev/zero > big.bin; cat > result.json <<'END'\n{json.dumps(document)}\nEND"
    )
    spec = {
        "kind": "workflow",
        "name": "maker",
        "sandbox": {"mode": "mock"},
        "workflow": {
            "steps": [{"name": "make", "run": {"program": "sh", "args": ["-c", script]}}],
            "output_step": "make",
        },
    }
    path = tmp_path_factory.mktemp("specs") / "maker.json"
    path.write_text(json.dumps(spec))
    made = client.start(path)
    state = client.wait_end(made)
    assert state.status.value == "succeeded", state.error
    return made


def test_files_are_listed_with_their_true_sizes_and_digests(voidbus: Run, run_id: str) -> None:
    done = voidbus("artifacts", run_id, "--stage", "make", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"run_id", "artifacts"}
    assert document["run_id"] == run_id
    fields = {"stage", "name", "media_type", "size_bytes", "digest"}
    assert all(set(each) == fields for each in document["artifacts"])
    listed = {each["name"]: each for each in document["artifacts"]}
    assert set(listed) == {"result.json", "big.bin"}
    big = listed["big.bin"]
    assert big["size_bytes"] == BIG
    assert big["digest"] == hashlib.sha256(bytes(BIG)).hexdigest()
    table = voidbus("artifacts", run_id).stdout.decode()
    assert "STAGE" in table
    assert "big.bin" in table
    assert "main" in table, "kept under the name main too"


def test_a_file_is_written_to_standard_output_or_to_a_file(
    voidbus: Run, run_id: str, tmp_path: Path
) -> None:
    assert voidbus("artifacts", run_id, "big.bin").stdout == bytes(BIG)
    done = voidbus("artifacts", run_id, "big.bin", "-o", tmp_path / "big")
    assert (done.returncode, done.stdout) == (0, b"")
    assert (tmp_path / "big").read_bytes() == bytes(BIG)
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_what_cannot_be_fetched_is_said_in_one_line(
    voidbus: Run, run_id: str, tmp_path: Path
) -> None:
    done = voidbus("artifacts", run_id, "nope")
    assert done.returncode == 1
    assert b"has left no file 'nope'; it has: big.bin, result.json" in done.stderr
    done = voidbus("artifacts", run_id, "big.bin", "-o", tmp_path / "no" / "dir")
    assert done.returncode == 1
    assert b"can't be written" in done.stderr
    assert voidbus("artifacts", run_id, "-o", "x").returncode == 2
    assert voidbus("artifacts", "no-such-run").returncode == 4


def test_a_prune_says_what_it_would_forget_and_then_forgets_it(
    voidbus: Run, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "one.json"
    path.write_text(
        json.dumps(
            {
                "kind": "workflow",
                "name": "one",
                "sandbox": {"mode": "mock"},
                "workflow": {"steps": [{"name": "a", "run": {"program": "true"}}]},
            }
        )
    )
    ended = client.start(path)
    client.wait_end(ended)
    sandbox = tmp_path / "box.json"
    sandbox.write_text(json.dumps({"kind": "sandbox", "name": "b", "sandbox": {"mode": "mock"}}))
    going = client.start(sandbox)
    dry = json.loads(voidbus("prune", "--older-than", "0s", "--dry-run", "--json").stdout)
    assert set(dry) == {"runs", "count", "size_bytes", "freed_bytes", "dry_run"}
    assert ended in dry["runs"]
    assert going not in dry["runs"]
    assert json.loads(voidbus("prune", "--older-than", "1d", "--json").stdout)["count"] == 0
    done = voidbus("prune", "--older-than", "0s")
    assert done.returncode == 0, done.stderr
    assert b"forgot" in done.stdout
    assert voidbus("inspect", ended).returncode == 4
    assert voidbus("inspect", going).returncode == 0
    client.cancel(going)
    client.wait_end(going)


@pytest.mark.parametrize(
    "arguments", [(), ("--older-than", "soon"), ("--max-size", "much"), ("--older-than", "-1d")]
)
def test_a_prune_without_a_measure_forgets_nothing(
    voidbus: Run, arguments: tuple[str, ...]
) -> None:
    done = voidbus("prune", *arguments)
    assert done.returncode == 2
    assert b"error" in done.stderr.lower()
