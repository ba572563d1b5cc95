"""What is held of runs that have ended stays within its bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from voidbus.actors.held_runs import HeldRun, HeldRuns


def run(size: int, last_seq: int = 0) -> HeldRun:
    return HeldRun(b"s" * (size // 2), b"e" * (size - size // 2), last_seq)


def test_what_nobody_has_read_for_longest_gives_way() -> None:
    held = HeldRuns(30)
    for name in ("a", "b", "c"):
        held.hold(name, run(10))
    assert held.get("a") is not None
    held.hold("d", run(10))
    assert held.get("b") is None
    assert all(held.get(name) is not None for name in ("a", "c", "d"))


def test_nothing_is_left_once_some_were_pruned() -> None:
    held = HeldRuns(30)
    held.hold("a", run(30))
    held.clear()
    assert held.get("a") is None
    held.hold("b", run(30))
    assert held.get("b") is not None


@given(
    st.integers(min_value=0, max_value=40),
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(min_value=0, max_value=50))),
)
def test_all_together_are_never_larger_than_the_limit(
    limit: int, runs: list[tuple[str, int]]
) -> None:
    held = HeldRuns(limit)
    newest: dict[str, HeldRun] = {}
    for number, (name, size) in enumerate(runs):
        newest[name] = run(size, number)
        held.hold(name, newest[name])
        found = {each: held.get(each) for each in "abcd"}
        assert sum(each.size for each in found.values() if each is not None) <= limit
        assert all(each is None or each is newest[name] for name, each in found.items())
