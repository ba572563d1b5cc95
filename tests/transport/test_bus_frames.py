"""Frames and deadlines as properties."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.transport.envelope import Envelope, FrameError, Kind, read_envelope
from voidbus.transport.topics import TopicTracker

_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
_u64 = st.integers(0, 2**64 - 1)


@given(
    kind=st.sampled_from(Kind),
    dest=_text,
    strings=st.tuples(_text, _text, _text, _text),
    numbers=st.tuples(_u64, _u64, st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1)),
    deadline=st.floats(0, 1e11),
    body=st.binary(max_size=100),
    attachments=st.lists(st.binary(max_size=20), max_size=16),
)
def test_what_is_written_is_what_is_read(
    kind: Kind,
    dest: str,
    strings: tuple[str, str, str, str],
    numbers: tuple[int, int, int, int],
    deadline: float,
    body: bytes,
    attachments: list[bytes],
) -> None:
    tag, sender, key, trace = strings
    origin, sequence, generation, version = numbers
    written = Envelope(
        kind,
        dest,
        sender,
        origin=origin,
        sequence=sequence,
        tag=tag,
        version=version,
        deadline=deadline,
        generation=generation,
        key=key,
        trace=trace,
        body=body,
        attachments=attachments,
    )
    read = read_envelope(written.frames())
    for name in Envelope.__slots__:
        assert getattr(read, name) == getattr(written, name)


_good = Envelope(Kind.ASK, "hub/x", "a/b", tag="t", deadline=1.0, body=b"{}").frames()[0]


@given(
    st.one_of(
        st.lists(st.binary(max_size=80), max_size=20),
        st.tuples(st.integers(0, 80), st.binary(max_size=8)).map(
            lambda cut: [_good[: cut[0]] + cut[1] + _good[cut[0] :]]
        ),
        st.tuples(st.integers(0, len(_good) - 1), st.integers(0, 255)).map(
            lambda flip: [_good[: flip[0]] + bytes([flip[1]]) + _good[flip[0] + 1 :]]
        ),
    )
)
def test_whatever_is_read_raises_a_frame_error_or_nothing(frames: list[bytes]) -> None:
    with contextlib.suppress(FrameError):
        read_envelope(frames)


@pytest.mark.parametrize("limit", [17, 18])
def test_more_attachments_than_the_limit_are_not_written(limit: int) -> None:
    with pytest.raises(FrameError, match="attachments"):
        Envelope(Kind.TELL, "a/b", "c/d", attachments=[b""] * limit).frames()


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60))
def test_a_trackers_losses_are_exactly_what_was_not_delivered(
    arrives: list[bool], start: int
) -> None:
    tracker, gaps = TopicTracker("t"), list[int]()
    tracker.observe(1, start, mark=True)
    for number, arrived in enumerate(arrives, start + 1):
        if arrived:
            _, gap = tracker.observe(1, number)
            gaps.extend(range(gap.first, gap.last + 1) if gap else ())
    _, gap = tracker.observe(1, start + len(arrives), mark=True)
    gaps.extend(range(gap.first, gap.last + 1) if gap else ())
    lost = [n for n, arrived in enumerate(arrives, start + 1) if not arrived]
    assert gaps == lost
    assert tracker.lost == len(lost)
