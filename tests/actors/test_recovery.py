"""What is made of a run whose process is gone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from journal_kit import a_batch, a_run

from voidbus.actors.event import EventMaker
from voidbus.actors.journal_store import JournalStore
from voidbus.actors.kept_intents import KeptState
from voidbus.actors.leases import LeaseFile
from voidbus.actors.messages.journal import AppendEvents, RunOutcome, RunProgress
from voidbus.actors.messages.runs import RunState, RunStatus, StageState
from voidbus.actors.recovery import Recovered, recover, remove_directory
from voidbus.actors.run_process import INTENTS_FILE
from voidbus.actors.runtime.process import identity_of
from voidbus.actors.spool import Spool
from voidbus.sidecar.model import InboxSnapshot
from voidbus.transport.envelope import BODY_LIMIT

SUCCEEDED = RunOutcome(status=RunStatus.SUCCEEDED, exit_code=0)


def state_of(last_seq: int = 1, **fields: object) -> RunState:
    return a_run().state.model_copy(update={"last_seq": last_seq, "generation": 7, **fields})


def spooled(folder: Path, *batches: AppendEvents) -> None:
    spool = Spool(folder / "spool.jsonl")
    for batch in batches:
        spool.add(batch)
    spool.close()


def recovered(
    folder: Path, state: RunState | None = None, cancel_reason: str | None = None
) -> Recovered:
    return recover(state or state_of(), folder, reason="it was killed", cancel_reason=cancel_reason)


def types(result: Recovered) -> list[str]:
    return [event.event_type for batch in result.batches for event in batch.events]


def test_a_run_without_a_spool_failed_for_the_reason_given(tmp_path: Path) -> None:
    result = recovered(tmp_path)
    (batch,) = result.batches
    assert [(e.seq, e.event_type, e.message) for e in batch.events] == [
        (2, "run.failed", "run failed: it was killed")
    ]
    assert batch.events[0].payload == {"processes_killed": 0, "paths_removed": 0}
    assert batch.outcome == RunOutcome(
        status=RunStatus.FAILED, error="it was killed", terminal_reason="it was killed"
    )


def test_what_was_spooled_comes_first_and_the_end_follows_it(tmp_path: Path) -> None:
    spooled(tmp_path, a_batch(first=0, count=3), a_batch(first=3, count=2))
    result = recovered(tmp_path)
    assert [e.seq for batch in result.batches for e in batch.events] == [2, 3, 4, 5]
    assert types(result)[-1] == "run.failed"


def test_the_outcome_that_was_spooled_is_the_outcome(tmp_path: Path) -> None:
    spooled(tmp_path, a_batch(first=2, count=1), a_batch(first=3, outcome=SUCCEEDED))
    result = recovered(tmp_path, cancel_reason="enough")
    assert result.batches[-1].outcome == SUCCEEDED
    assert "run.cancelled" not in types(result)


def test_a_run_that_was_being_cancelled_is_cancelled(tmp_path: Path) -> None:
    result = recovered(tmp_path, cancel_reason="enough")
    assert types(result) == ["run.cancelled"]
    assert result.batches[-1].outcome == RunOutcome(
        status=RunStatus.CANCELLED, terminal_reason="enough"
    )


@pytest.mark.parametrize("cancelled", [False, True])
def test_stages_that_ran_are_ended_with_the_run(tmp_path: Path, cancelled: bool) -> None:
    maker = EventMaker("r1", "mock", 2)
    started = maker.make("stage.started", "b started", stage="b", group="g1")
    spooled(tmp_path, AppendEvents(run_id="r1", generation=7, events=(started,)))
    known = {"a": StageState(status="running"), "z": StageState(status="succeeded")}
    result = recovered(
        tmp_path, state_of(stage_states=known), cancel_reason="enough" if cancelled else None
    )
    ends = [e for e in result.batches[-1].events if e.event_type == "stage.failed"]
    error = "run cancelled" if cancelled else "it was killed"
    assert [(e.stage_name, e.group_id, (e.payload or {})["error"]) for e in ends] == [
        ("a", None, error),
        ("b", "g1", error),
    ]
    progress = result.batches[-1].progress
    assert progress is not None
    assert progress.stage_states is not None
    assert {name: s.status for name, s in progress.stage_states.items()} == {
        "a": "failed",
        "b": "failed",
        "z": "succeeded",
    }


def test_stages_that_were_only_queued_are_skipped(tmp_path: Path) -> None:
    maker = EventMaker("r1", "mock", 0)
    journaled = [
        maker.make("stage.queued", f"{name} queued", stage=name, group=f"g-{name}")
        for name in ("a", "b", "c", "d")
    ]
    journaled.append(maker.make("stage.started", "a started", stage="a", group="g-a"))
    spooled(
        tmp_path,
        AppendEvents(
            run_id="r1",
            generation=7,
            events=(
                maker.make("stage.completed", "a completed", stage="a", group="g-a"),
                maker.make("stage.started", "b started", stage="b", group="g-b"),
            ),
        ),
    )
    result = recover(
        state_of(last_seq=4),
        tmp_path,
        reason="it was killed",
        cancel_reason=None,
        stage_events=journaled,
    )
    ends = result.batches[-1].events
    assert [(e.event_type, e.stage_name, e.group_id) for e in ends] == [
        ("stage.failed", "b", "g-b"),
        ("stage.skipped", "c", "g-c"),
        ("stage.skipped", "d", "g-d"),
        ("run.failed", None, None),
    ]
    assert (ends[1].payload or {})["reason"] == "it was killed"
    progress = result.batches[-1].progress
    assert progress is not None
    assert {name: s.status for name, s in (progress.stage_states or {}).items()} == {
        "a": "succeeded",
        "b": "failed",
        "c": "skipped",
        "d": "skipped",
    }


def test_a_run_of_any_number_of_stages_is_ended(tmp_path: Path) -> None:
    maker = EventMaker("r1", "mock", 2)
    count = 1000
    queued = [maker.make("stage.queued", "queued", stage=f"s{n}") for n in range(count)]
    result = recover(
        state_of(last_seq=count + 1),
        tmp_path,
        reason="it was killed",
        cancel_reason=None,
        stage_events=queued,
    )
    assert types(result) == ["stage.skipped"] * count + ["run.failed"]
    assert [e.seq for b in result.batches for e in b.events] == [count + 2 + n for n in range(1001)]
    assert [batch.outcome is not None for batch in result.batches] == [False, False, True]
    assert result.batches[-1].events[-1].event_type == "run.failed"


def test_batches_carry_the_generation_the_journal_has(tmp_path: Path) -> None:
    spooled(tmp_path, a_batch(first=2, generation=3))
    assert {batch.generation for batch in recovered(tmp_path).batches} == {7}


def test_a_spool_cut_short_counts_as_far_as_it_makes_sense(tmp_path: Path) -> None:
    spooled(tmp_path, a_batch(first=2), a_batch(first=3, outcome=SUCCEEDED))
    path = tmp_path / "spool.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    result = recovered(tmp_path)
    assert [e.seq for batch in result.batches for e in batch.events] == [2, 3]
    assert types(result)[-1] == "run.failed"


def test_another_runs_spool_is_not_believed(tmp_path: Path) -> None:
    spooled(tmp_path, a_batch("r2", first=2, outcome=SUCCEEDED))
    assert types(recovered(tmp_path)) == ["run.failed"]


def test_what_was_held_is_freed_and_counted(tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        leases = LeaseFile(tmp_path / "leases.jsonl")
        leases.path(tmp_path / "machine")
        leases.process(identity_of(process.pid))
        leases.close()
        result = recovered(tmp_path)
        assert process.wait(20.0) == -9
    assert result.batches[-1].events[-1].payload == {"processes_killed": 1, "paths_removed": 1}
    remove_directory(tmp_path / "machine")  # again is fine


def test_the_journal_takes_what_was_recovered_and_the_run_has_ended(tmp_path: Path) -> None:
    store = JournalStore(tmp_path / "journal.sqlite")
    try:
        store.create(a_run(), 1)
        progress = a_batch(first=2, count=2).model_copy(
            update={"progress": RunProgress(machine="process", active_microvm_count=1)}
        )
        store.append(progress)
        spooled(tmp_path, progress, a_batch(first=4, count=2))
        for batch in recover(
            store.run("r1"), tmp_path, reason="it was killed", cancel_reason=None
        ).batches:
            state, _ = store.append(batch)
        assert state.status is RunStatus.FAILED
        assert (state.machine, state.active_microvm_count) == ("process", 0)
        events = store.events("r1", after=-1, limit=100)
        assert [e.seq for e in events] == list(range(7))
        assert state.terminal_event_id == events[-1].event_id
    finally:
        store.close()


def an_intent(state: KeptState, payload: object = "hello") -> str:
    submission = {"kind": "signal", "audience": "leader", "priority": "low", "payload": payload}
    submitted = state.submit(json.dumps(submission).encode())
    assert submitted.rejection is None
    return submitted.intents[0].intent_id


def kept_state(folder: Path) -> KeptState:
    return KeptState(folder / INTENTS_FILE, execution_id="r1", candidate_id="r1")


def kept(result: Recovered) -> list[str]:
    outcome = result.batches[-1].outcome
    assert outcome is not None
    return [intent.intent_id for intent in outcome.intents]


def test_intents_that_waited_are_left_to_the_journal(tmp_path: Path) -> None:
    state = kept_state(tmp_path)
    first, second, third = (an_intent(state, n) for n in range(3))
    state.acknowledge([second])
    assert kept(recovered(tmp_path)) == [first, third]
    assert (tmp_path / INTENTS_FILE).stat().st_mode & 0o777 == 0o600


def test_intents_that_were_drained_or_have_expired_are_not(tmp_path: Path) -> None:
    state = kept_state(tmp_path)
    an_intent(state)
    inbox = InboxSnapshot(execution_id="r1", candidate_id="r1", iteration=9, entries=())
    state.load_inbox(inbox)
    assert kept(recovered(tmp_path)) == []
    an_intent(state)
    state.drain()
    assert kept(recovered(tmp_path)) == []


def test_the_intents_of_an_outcome_that_was_spooled_stand(tmp_path: Path) -> None:
    an_intent(kept_state(tmp_path))
    spooled(tmp_path, a_batch(first=2, outcome=SUCCEEDED))
    assert kept(recovered(tmp_path)) == []


def test_an_intent_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path) -> None:
    state = kept_state(tmp_path)
    whole = an_intent(state)
    an_intent(state, "cut short")
    path = tmp_path / INTENTS_FILE
    path.write_bytes(b"\xff\n" + path.read_bytes()[:-20])
    assert kept(recovered(tmp_path)) == [whole]


def test_an_intent_nested_too_deep_for_a_message_does_not_keep_its_run_from_ending(
    tmp_path: Path,
) -> None:
    state = kept_state(tmp_path)
    whole = an_intent(state)
    nested = b"[" * 199 + b"]" * 199
    state.submit(
        b'{"kind":"signal","audience":"leader","priority":"low","payload":' + nested + b"}"
    )
    assert kept(recovered(tmp_path)) == [whole]


def test_no_more_intents_are_recovered_than_a_message_holds(tmp_path: Path) -> None:
    state = kept_state(tmp_path)
    an_intent(state, "x" * 4000)
    path = tmp_path / INTENTS_FILE
    path.write_bytes(path.read_bytes() * 1024)
    batch = recovered(tmp_path).batches[-1]
    assert batch.outcome is not None
    assert len(batch.outcome.intents) > 500
    assert len(batch.to_json()) < BODY_LIMIT


def test_a_disk_that_takes_nothing_does_not_keep_an_intent_from_being_drained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = kept_state(tmp_path / "gone")
    intent_id = an_intent(state)
    assert "a kill would lose them" in caplog.text
    (tmp_path / "gone").mkdir()
    second = an_intent(state, 2)
    assert kept(recovered(tmp_path / "gone")) == [intent_id, second]
    assert [intent.intent_id for intent in state.drain()] == [intent_id, second]
