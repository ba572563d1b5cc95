"""What is kept of a stage's files, and how much of it."""

from __future__ import annotations

import json

from conductor_kit import FakeConductor, FakeMachine

from voidbus.actors.workloads.conductor import KeptFile
from voidbus.actors.workloads.output import STAGE_FILES_LIMIT, OutputCollector
from voidbus.actors.workloads.publication import OutputFault, StageOutput

OUTPUT = "/workspace/result.json"


def document(*names: str) -> bytes:
    artifacts = [{"name": name, "path": f"/workspace/{name}"} for name in names]
    return json.dumps({"status": "ok", "artifacts": artifacts}).encode()


class House:
    """A collector with room for `limit` bytes, and what it has collected."""

    def __init__(self, limit: int) -> None:
        self.conductor = FakeConductor()
        self.machine = FakeMachine(self.conductor, 0)
        self._collector = OutputCollector(self.conductor, "r1", limit)

    def collect(self, **files: bytes) -> StageOutput:
        self.conductor.files = {f"/workspace/{name}": content for name, content in files.items()}
        self.conductor.files[OUTPUT] = self.conductor.files.pop("/workspace/output")
        got: list[StageOutput] = []

        def take(output: StageOutput, _: KeptFile | None) -> None:
            got.append(output)

        self._collector.collect(self.machine, "s", OUTPUT, take)
        self.conductor.settle()
        (output,) = got
        return output

    def refused(self) -> list[str]:
        return [e.message for e in self.conductor.events if e.event_type == "artifact.refused"]


def kept(output: StageOutput) -> list[str]:
    return [entry.name for entry in output.artifacts if entry.digest is not None]


def test_of_one_stage_so_many_named_files_are_kept_and_the_others_told_of() -> None:
    house = House(limit=1_000_000)
    names = [f"f{number}" for number in range(STAGE_FILES_LIMIT + 3)]
    output = house.collect(output=document(*names), **{name: name.encode() for name in names})
    assert kept(output) == names[:STAGE_FILES_LIMIT]
    assert len(house.refused()) == 3
    assert all(f"{STAGE_FILES_LIMIT} files" in message for message in house.refused())


def test_a_file_past_what_the_run_may_leave_is_refused_and_those_that_fit_are_kept() -> None:
    text = document("a", "b", "c")
    house = House(limit=len(text) + 100)
    output = house.collect(output=text, a=b"a" * 60, b=b"b" * 60, c=b"c" * 40)
    assert kept(output) == ["a", "c"]
    assert output.fault is None
    (message,) = house.refused()
    assert message.startswith("'b' is not kept")


def test_an_output_file_past_what_the_run_may_leave_is_missing() -> None:
    house = House(limit=10)
    output = house.collect(output=document())
    assert (output.output, output.fault) == (None, OutputFault.MISSING)
    assert len(house.refused()) == 1


def test_what_a_run_leaves_counts_over_all_its_stages() -> None:
    house = House(limit=100)
    assert house.collect(output=b"x" * 60).output is not None
    assert house.collect(output=b"y" * 60).output is None


def test_content_that_comes_again_takes_no_more_room() -> None:
    house = House(limit=130)
    for _ in range(5):
        assert house.collect(output=b"x" * 60).output is not None
    assert house.refused() == []
