"""Events: names in both spellings, ids that sort by time, timestamps."""

from __future__ import annotations

import re
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.actors.event import EventMaker, second_name, timestamp, uuid7


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("run.started", "RunStarted"),
        ("run.finished", "RunCompleted"),
        ("run.failed", "RunFailed"),
        ("run.cancelled", "RunCancelled"),
        ("run.spec.loaded", "SpecLoaded"),
        ("env.provisioned", "EnvironmentProvisioned"),
        ("box.started", "BoxStarted"),
        ("skill.mounted", "SkillMounted"),
        ("workflow.planned", "WorkflowPlanned"),
        ("log.chunk", "LogChunk"),
        ("log.closed", "LogClosed"),
        ("spec.parse_failed", "SpecParseFailed"),
        ("stage.queued", "StageQueued"),
        ("stage.started", "StageStarted"),
        ("stage.failed", "StageFailed"),
        ("stage.skipped", "StageSkipped"),
        ("stage.completed", "StageSucceeded"),
        ("run.output_ready", "RunOutputReady"),
        ("sidecar.intent_accepted", "SidecarIntentAccepted"),
    ],
)
def test_each_event_has_its_second_name(first: str, second: str) -> None:
    assert second_name(first) == second
    assert EventMaker("r", "mock").make(first, "m").event_type_v2 == second


@given(now_ms=st.integers(0, 2**48 - 1))
def test_an_id_is_a_uuid_of_version_7_that_holds_its_time(now_ms: int) -> None:
    made = UUID(uuid7(now_ms))
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert made.int >> 80 == now_ms


@given(earlier=st.integers(0, 2**48 - 2), gap=st.integers(1, 10_000))
def test_ids_sort_by_time(earlier: int, gap: int) -> None:
    assert uuid7(earlier) < uuid7(min(earlier + gap, 2**48 - 1))


def test_ids_of_one_millisecond_differ() -> None:
    assert len({uuid7(1) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("now_ns", "expected"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_700_000_000_000_000_000, "2023-11-14T22:13:20Z"),
        (1_700_000_000_000_000_001, "2023-11-14T22:13:20.000000001Z"),
        (1_700_000_000_120_000_000, "2023-11-14T22:13:20.120000000Z"),
    ],
)
def test_a_timestamp_has_nine_digits_where_there_is_a_fraction(now_ns: int, expected: str) -> None:
    assert timestamp(now_ns) == expected


@given(now_ns=st.integers(0, 4_000_000_000 * 10**9))
def test_any_timestamp_is_rfc_3339_in_utc(now_ns: int) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{9})?Z", timestamp(now_ns))


def test_events_are_numbered_on_from_where_the_journal_is() -> None:
    maker = EventMaker("r1", "mock", 5)
    events = [maker.make("log.chunk", str(n)) for n in range(3)]
    assert [event.seq for event in events] == [5, 6, 7]
    assert maker.next_seq == 8


def test_every_key_of_an_event_is_there_and_null_where_it_is_not_set() -> None:
    event = EventMaker("r1", "mock").make("run.started", "hello")
    fields = event.model_dump(mode="json")
    assert set(fields) == {
        "ts_ms", "level", "event_type", "message", "run_id", "box_name", "skill_id", "skill_type",
        "environment_id", "mode", "stream", "seq", "payload", "stage_name", "group_id", "event_id",
        "attempt_id", "timestamp", "event_type_v2",
    }  # fmt: skip
    assert {name for name, value in fields.items() if value is None} == {
        "box_name", "skill_id", "skill_type", "stream", "payload", "stage_name", "group_id",
    }  # fmt: skip
    assert (fields["environment_id"], fields["mode"]) == ("env-r1", "mock")
    assert (fields["seq"], fields["attempt_id"], fields["level"]) == (0, 1, "info")
    assert UUID(fields["event_id"]).int >> 80 == fields["ts_ms"]


def test_a_skill_is_its_type_and_its_id() -> None:
    event = EventMaker("r1", "mock").make("skill.mounted", "m", skill=("file", "a.md"))
    assert (event.skill_type, event.skill_id) == ("file", "a.md")
