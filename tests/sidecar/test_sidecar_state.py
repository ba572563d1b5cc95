"""The rules of the inbox and of intents, one by one and as a state machine."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sidecar_kit import entry, inbox, intent

from voidbus.sidecar.model import InboxSnapshot, Intent, Rejected, Rejection, SidecarSnapshot
from voidbus.sidecar.state import Limits, SidecarState, Submitted
from voidbus.sidecar.submission import MAX_DEPTH, read_submissions


def new_state(**limits: int) -> SidecarState:
    numbers = itertools.count(1)
    return SidecarState(
        execution_id="run",
        candidate_id="run",
        limits=Limits(**limits),
        new_intent_id=lambda: f"int-{next(numbers)}",
    )


def submit(state: SidecarState, body: Any, key: str | None = None) -> Submitted:
    return state.submit(json.dumps(body).encode(), idempotency_key=key)


def rejection(submitted: Submitted) -> Rejection:
    assert submitted.rejection is not None
    return submitted.rejection


def ids(intents: tuple[Intent, ...] | list[Intent]) -> list[str]:
    return [one.intent_id for one in intents]


def seen(state: SidecarState, since: int | None = None) -> list[str]:
    return [one.message_id for one in state.inbox(since).entries]


# Inbox


def test_before_any_load_the_inbox_is_version_0_of_the_run_itself() -> None:
    view = new_state().inbox()
    assert view.model_dump() == {
        "version": 0,
        "execution_id": "run",
        "candidate_id": "run",
        "iteration": 0,
        "entries": (),
    }


def test_a_snapshot_without_a_version_is_numbered_after_the_present_one() -> None:
    state = new_state()
    assert state.load_inbox(inbox("a", version=4)).version == 4
    assert state.load_inbox(inbox("b")).version == 5


def test_unknown_keys_of_a_snapshot_are_ignored_and_missing_fields_refused() -> None:
    body = {
        "execution_id": "e",
        "candidate_id": "c",
        "iteration": 2,
        "extra": 1,
        "entries": [
            {
                "message_id": "m",
                "from_candidate_id": "x",
                "kind": "k",
                "payload": None,
                "intent_id": "i",
            }
        ],
    }
    assert InboxSnapshot.model_validate_json(json.dumps(body)).entries[0] == entry("m").model_copy(
        update={"from_candidate_id": "x", "kind": "k"}
    )
    for field in ("execution_id", "candidate_id", "iteration", "entries"):
        with pytest.raises(ValueError, match=field):
            InboxSnapshot.model_validate({k: v for k, v in body.items() if k != field})


def test_since_gives_only_what_arrived_after_that_version() -> None:
    state = new_state()
    state.load_inbox(inbox("a", "b", version=1))
    state.load_inbox(inbox("a", "b", "c", version=2))
    assert seen(state) == ["a", "b", "c"]
    assert seen(state, 0) == ["a", "b", "c"]
    assert seen(state, 1) == ["c"]
    assert seen(state, 2) == []
    assert seen(state, 99) == []


def test_an_entry_whose_content_changed_arrives_again() -> None:
    state = new_state()
    state.load_inbox(inbox("a", version=1, payload=1))
    state.load_inbox(inbox("a", version=2, payload=2))
    assert seen(state, 1) == ["a"]


def test_a_pushed_message_raises_the_version_and_makes_an_inbox_where_there_is_none() -> None:
    state = new_state()
    assert state.push_message(entry("m")) == 1
    assert state.push_message(entry("n")) == 2
    assert seen(state, 1) == ["n"]
    assert state.context().iteration == 0


def test_a_load_whose_version_pushed_messages_have_overtaken_is_still_seen_by_readers() -> None:
    state = new_state()
    state.load_inbox(inbox("a", version=1))
    state.push_message(entry("m"))
    assert state.load_inbox(inbox("a", "b", version=2)).version == 3
    assert seen(state, 2) == ["b"]


def test_a_version_that_goes_back_is_taken_as_given() -> None:
    state = new_state()
    state.load_inbox(inbox("a", version=7))
    assert state.load_inbox(inbox("a", version=3)).version == 3
    assert seen(state, 2) == ["a"]


def test_an_inbox_over_a_limit_is_refused_and_changes_nothing() -> None:
    state = new_state(inbox_entries=2, inbox_bytes=400)
    state.load_inbox(inbox("a", "b", version=1))
    for refused in (inbox("a", "b", "c"), inbox("a", payload="x" * 400)):
        with pytest.raises(Rejected, match="limit") as caught:
            state.load_inbox(refused)
        assert caught.value.rejection.status == 413
    with pytest.raises(Rejected, match="3 entries"):
        state.push_message(entry("c"))
    assert (state.status().inbox_version, seen(state)) == (1, ["a", "b"])


# Intents


def test_an_accepted_intent_is_stamped() -> None:
    state = SidecarState(execution_id="e", candidate_id="cand")
    state.load_inbox(inbox(iteration=5))
    (stamped,) = submit(state, intent({"a": 1}, kind="proposal", priority="high")).intents
    assert stamped.intent_id.startswith("int-")
    assert len(stamped.intent_id) == 36
    assert stamped.model_dump(exclude={"intent_id"}) == {
        "from_candidate_id": "cand",
        "iteration": 5,
        "kind": "proposal",
        "audience": "broadcast",
        "payload": {"a": 1},
        "priority": "high",
        "ttl_iterations": 2,
    }


def test_the_same_payload_and_audience_in_one_iteration_is_one_intent() -> None:
    state = new_state()
    first = submit(state, intent({"a": 1, "b": 2}))
    same = submit(state, intent({"b": 2, "a": 1}, kind="proposal", priority="low"))
    other = submit(state, intent({"a": 1, "b": 2}, audience="leader"))
    assert (same.intents, same.duplicates) == (first.intents, (True,))
    assert other.duplicates == (False,)
    assert state.status().buffer_depth == 2


def test_an_idempotency_key_is_checked_before_content_and_size() -> None:
    state = new_state()
    first = submit(state, intent("a"), key="k")
    again = submit(state, intent("b"), key="k")
    large = submit(state, [intent("x" * 5000)], key="k")
    assert again.intents == large.intents == first.intents


def test_a_fourth_intent_is_too_many_but_a_duplicate_is_still_answered() -> None:
    state = new_state()
    for number in range(3):
        submit(state, intent(number))
    refused = rejection(submit(state, intent(3)))
    assert (refused.status, refused.code, refused.retryable, refused.message) == (
        429,
        "TOO_MANY_REQUESTS",
        True,
        "max intents per iteration reached",
    )
    assert submit(state, intent(2)).duplicates == (True,)
    assert rejection(submit(state, [intent("x" * 5000)])).status == 413  # size before count


def test_draining_forgets_duplicates_but_not_the_count() -> None:
    state = new_state()
    first = submit(state, intent("a"), key="k").intents
    assert state.drain() == list(first)
    assert state.drain() == []
    assert submit(state, intent("a"), key="k").duplicates == (False,)
    submit(state, intent("b"))
    assert rejection(submit(state, intent("c"))).status == 429


def test_loading_an_inbox_resets_count_and_duplicates_and_keeps_intents() -> None:
    state = new_state()
    for number in range(3):
        submit(state, intent(number), key=str(number))
    state.load_inbox(inbox(iteration=0))
    assert submit(state, intent(0), key="0").duplicates == (False,)
    assert state.status().buffer_depth == 4


def test_peeked_intents_stay_until_acknowledged() -> None:
    state = new_state()
    submit(state, [intent(1), intent(2), intent(3)])
    first, second = state.peek(2)
    assert state.peek(2) == [first, second]
    assert state.acknowledge([first.intent_id, first.intent_id, "int-unknown"]) == 1
    assert state.acknowledge([first.intent_id]) == 0
    assert ids(state.peek()) == ["int-2", "int-3"]
    assert ids(state.drain(1)) == ["int-2"]


def test_an_intent_expires_after_two_more_iterations() -> None:
    state = new_state()
    submit(state, intent("old"))
    assert state.load_inbox(inbox(iteration=2)).expired == ()
    submit(state, intent("new"))
    assert ids(state.load_inbox(inbox(iteration=3)).expired) == ["int-1"]
    assert ids(state.peek()) == ["int-2"]
    assert state.counters().expired == 1


def test_a_batch_keeps_what_came_before_its_first_rejection() -> None:
    state = new_state()
    result = submit(state, [intent(1), intent("x" * 5000), intent(2)])
    assert rejection(result).status == 413
    assert [one.payload for one in state.peek()] == [1]
    result = submit(state, [intent(n) for n in (2, 3, 4)])
    assert rejection(result).status == 429
    assert state.status().buffer_depth == 3


def test_a_batch_with_one_malformed_item_buffers_none() -> None:
    state = new_state()
    assert rejection(submit(state, [intent(1), {}])).field == "[1].kind"
    assert state.status().buffer_depth == 0


def test_the_key_of_a_batch_is_the_first_items_only() -> None:
    state = new_state()
    batch = submit(state, [intent(1), intent(2)], key="k")
    assert batch.duplicates == (False, False)
    assert submit(state, intent(9), key="k").intents == batch.intents[:1]


def test_a_full_buffer_is_too_many() -> None:
    state = new_state(buffered_intents=1)
    submit(state, intent(1))
    assert "wait to be drained" in rejection(submit(state, intent(2))).message


@pytest.mark.parametrize(
    ("change", "field", "found", "allowed"),
    [
        ({"kind": "wish"}, "kind", "'wish'", ("proposal", "signal", "evaluation")),
        ({"audience": 3}, "audience", "3", ("leader", "broadcast")),
        ({"priority": None}, "priority", "null", ("low", "normal", "high")),
        ({"kind": {"a": 1}}, "kind", "an object", ("proposal", "signal", "evaluation")),
    ],
)
def test_a_wrong_value_is_refused_naming_field_found_and_allowed(
    change: dict[str, Any], field: str, found: str, allowed: tuple[str, ...]
) -> None:
    refused = rejection(submit(new_state(), intent(**change)))
    assert (refused.status, refused.code) == (400, "INVALID_PARAMS")
    assert (refused.field, refused.found, refused.allowed) == (field, found, allowed)
    assert found in refused.message
    assert allowed[0] in refused.message


@pytest.mark.parametrize("field", ["kind", "audience", "payload", "priority"])
def test_all_four_fields_are_required(field: str) -> None:
    body = {name: value for name, value in intent().items() if name != field}
    refused = rejection(submit(new_state(), body))
    assert (refused.status, refused.field) == (400, field)
    assert "missing" in refused.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"NaN",
        b"[" * 5000,
        b'"\\ud800"',
        b"7" * 5000,
        b"null",
        b"1",
        b'"text"',
        b'{"kind":"signal","audience":"leader","priority":"low","payload":1e999}',
        b'{"kind":"signal","audience":"leader","priority":"low","payload":"\\udc00"}',
    ],
)
def test_hostile_bodies_are_refused_as_invalid(body: bytes) -> None:
    refused = rejection(new_state().submit(body))
    assert (refused.status, refused.code) == (400, "INVALID_PARAMS")


def test_a_single_intent_counts_its_envelope_and_a_batch_only_payloads() -> None:
    state = new_state()
    payload = "x" * 4090  # 4092 bytes as JSON
    assert rejection(submit(state, intent(payload))).status == 413
    assert submit(state, [intent(payload)]).rejection is None
    assert submit(state, []).intents == ()
    assert submit(state, []).is_batch


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_raise(body: bytes) -> None:
    assert new_state().submit(body).rejection is not None or body.strip() == b"[]"


def test_a_restored_state_goes_on_where_the_other_left_off() -> None:
    state = new_state()
    state.load_inbox(inbox("a", version=1))
    state.push_message(entry("m"))
    submit(state, intent("a"), key="k")
    text = state.snapshot().model_dump_json()
    restored = new_state()
    restored.restore(SidecarSnapshot.model_validate_json(text))
    assert restored.snapshot() == state.snapshot()
    assert submit(restored, intent("z"), key="k").duplicates == (True,)
    assert seen(restored, 1) == ["m"]


class SidecarMachine(RuleBasedStateMachine):
    """Any sequence of operations against a plain model of the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.state = new_state(inbox_entries=6, buffered_intents=5)
        self.iteration = 0
        self.accepted = 0
        self.buffer: dict[str, tuple[Any, str, int]] = {}
        self.hashes: dict[tuple[Any, str, int], str] = {}
        self.keys: dict[str, str] = {}
        self.reader: dict[str, None] = {}
        self.reader_version = 0
        self.messages = itertools.count()

    @rule(
        payload=st.integers(0, 5),
        audience=st.sampled_from(["leader", "broadcast"]),
        key=st.none() | st.sampled_from(["k1", "k2"]),
    )
    def send(self, payload: int, audience: str, key: str | None) -> None:
        result = submit(self.state, intent(payload, audience=audience), key=key)
        content = (payload, audience, self.iteration)
        known = self.keys.get(key or "") or self.hashes.get(content)
        if known:
            assert (ids(result.intents), result.duplicates) == ([known], (True,))
        elif self.accepted >= 3 or len(self.buffer) >= 5:
            assert rejection(result).status == 429
        else:
            (stamped,) = result.intents
            assert result.duplicates == (False,)
            self.buffer[stamped.intent_id] = content
            self.hashes[content] = stamped.intent_id
            if key:
                self.keys[key] = stamped.intent_id
            self.accepted += 1

    @rule(limit=st.none() | st.integers(0, 3))
    def drain(self, limit: int | None) -> None:
        expected = list(self.buffer)[:limit]
        assert ids(self.state.drain(limit)) == expected
        self.forget(expected)

    @rule(index=st.integers(0, 4))
    def acknowledge(self, index: int) -> None:
        chosen = list(self.buffer)[index : index + 1]
        assert self.state.acknowledge(chosen) == len(chosen)
        self.forget(chosen)

    @rule(later=st.integers(0, 3), new_messages=st.integers(0, 2), ahead=st.integers(1, 3))
    def load(self, later: int, new_messages: int, ahead: int) -> None:
        self.iteration += later
        kept = seen(self.state)[-2:]
        new = [f"m{next(self.messages)}" for _ in range(new_messages)]
        version = self.state.snapshot().given_version + ahead
        loaded = self.state.load_inbox(
            inbox(*kept, *new, version=version, iteration=self.iteration)
        )
        expired = [i for i, content in self.buffer.items() if self.iteration > content[2] + 2]
        assert ids(loaded.expired) == expired
        self.forget(expired)
        self.accepted = 0
        self.hashes = {}
        self.keys = {}
        self.read(new)

    @rule()
    def push(self) -> None:
        name = f"m{next(self.messages)}"
        try:
            self.state.push_message(entry(name))
        except Rejected:
            assert len(seen(self.state)) == 6
        else:
            self.read([name])

    @rule()
    def hand_on(self) -> None:
        before = self.state.snapshot()
        self.state.restore(before)
        assert self.state.snapshot() == before

    def read(self, expected: list[str]) -> None:
        """A poller who always asks since the version it saw gets each message just once."""
        view = self.state.inbox(self.reader_version)
        assert [one.message_id for one in view.entries] == expected
        self.reader_version = view.version

    def forget(self, intent_ids: list[str]) -> None:
        for intent_id in intent_ids:
            del self.buffer[intent_id]
        self.hashes = {c: i for c, i in self.hashes.items() if i in self.buffer}
        self.keys = {k: i for k, i in self.keys.items() if i in self.buffer}

    @invariant()
    def the_buffer_is_as_expected(self) -> None:
        assert ids(self.state.peek()) == list(self.buffer)
        assert self.state.status().buffer_depth == len(self.buffer)
        counters = self.state.counters()
        waiting = counters.accepted - counters.acknowledged - counters.expired
        assert waiting == len(self.buffer)


TestSidecarMachine = SidecarMachine.TestCase
TestSidecarMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def nested(levels: int) -> bytes:
    payload = "[" * levels + "]" * levels
    return (
        '{"kind": "signal", "audience": "leader", "priority": "normal", "payload": ' + payload + "}"
    ).encode()


@pytest.mark.parametrize("levels", [1, MAX_DEPTH])
def test_a_payload_may_nest(levels: int) -> None:
    (item,) = read_submissions(nested(levels)).items
    assert item.kind == "signal"


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 190])
def test_a_payload_that_nests_too_deeply_to_be_carried_on_is_refused(levels: int) -> None:
    with pytest.raises(Rejected, match="nested too deeply; at most 64 levels"):
        read_submissions(nested(levels))
