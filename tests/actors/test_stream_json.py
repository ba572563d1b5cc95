"""What agents print: stream-json, lines, floods, and bytes of any kind."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from voidbus.actors.run_log import LINE_LIMIT, RunLog
from voidbus.actors.workloads.agent_stream import Said
from voidbus.actors.workloads.conductor import OUTPUT_LIMIT, Capture, LineSplitter, clip
from voidbus.actors.workloads.stream_json import StreamParser


def feed(*events: Any) -> tuple[StreamParser, list[Said]]:
    parser = StreamParser()
    said = [item for event in events for item in parser.feed(json.dumps(event).encode())]
    return parser, said


def assistant(*content: Any, **usage: int) -> dict[str, Any]:
    return {"type": "assistant", "message": {"content": list(content), "usage": usage}}


# -- the stream --------------------------------------------------------------------------------


def test_the_four_types_are_events_and_others_are_passed_over() -> None:
    parser, said = feed(
        {"type": "system"},
        assistant(),
        {"type": "user", "message": {"content": []}},
        {"type": "result"},
        {"type": "stream_event"},
        {"type": "rate_limit"},
    )
    assert parser.result.events == 4
    assert said == []


def test_tokens_are_summed_until_the_result_says_otherwise() -> None:
    parser, _ = feed(
        assistant(input_tokens=3, output_tokens=1), assistant(input_tokens=4, output_tokens=2)
    )
    assert (parser.result.input_tokens, parser.result.output_tokens) == (7, 3)
    parser.feed(b'{"type":"result","usage":{"input_tokens":9,"output_tokens":8}}')
    assert (parser.result.input_tokens, parser.result.output_tokens) == (9, 8)


def test_a_result_without_usage_keeps_the_sums() -> None:
    parser, _ = feed(assistant(input_tokens=3, output_tokens=1), {"type": "result"})
    assert (parser.result.input_tokens, parser.result.output_tokens) == (3, 1)


def test_the_result_is_read_whole() -> None:
    parser, _ = feed(
        {
            "type": "result",
            "result": "r",
            "is_error": True,
            "error": "e",
            "total_cost_usd": 1.5,
            "num_turns": 4,
        }
    )
    result = parser.result
    assert (result.result, result.is_error, result.error) == ("r", True, "e")
    assert (result.total_cost_usd, result.num_turns, result.ended) == (1.5, 4, True)


def test_fields_of_the_wrong_type_are_as_good_as_absent() -> None:
    parser, said = feed(
        {"type": "assistant", "message": [1]},
        {"type": "assistant", "message": {"content": {"a": 1}, "usage": 7}},
        assistant(3, {"type": "text", "text": 5}, {"type": "tool_use"}, input_tokens=-4),
        {
            "type": "result",
            "result": 7,
            "is_error": "yes",
            "error": {},
            "total_cost_usd": -1,
            "num_turns": True,
            "usage": {"input_tokens": 1e9, "output_tokens": None},
        },
    )
    result = parser.result
    assert said == []
    assert (result.result, result.is_error, result.error) == ("", False, "")
    assert (result.total_cost_usd, result.num_turns) == (0.0, 0)
    assert (result.input_tokens, result.output_tokens) == (0, 0)


def test_absurd_numbers_are_not_believed() -> None:
    parser = StreamParser()
    parser.feed(b'{"type":"result","total_cost_usd":NaN,"usage":{"input_tokens":1' + b"0" * 400)
    parser.feed(b'{"type":"result","total_cost_usd":1e400,"num_turns":' + b"9" * 5000 + b"}")
    parser.feed(b'{"type":"result","total_cost_usd":NaN}')
    assert parser.result.total_cost_usd == 0.0
    assert parser.result.num_turns == 0


def test_deep_nesting_is_no_harm() -> None:
    parser = StreamParser()
    for depth in (500, 900, 990, 5000, 100_000):
        nested = b"[" * depth + b"]" * depth
        parser.feed(nested)
        parser.feed(
            b'{"type":"assistant","message":{"content":[{"type":"tool_use","name":"t","input":'
            + nested
            + b"}]}}"
        )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())  # with surrogates, as JSON may spell them
    | st.sampled_from(["text", "tool_use", "assistant", "result", "content", "usage"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
keys = ("result", "is_error", "error", "usage", "total_cost_usd", "num_turns", "message")
objects = st.builds(
    lambda kind, fields, message: {"type": kind, **fields, "message": message},
    st.sampled_from(["system", "assistant", "user", "result", "other"]),
    st.dictionaries(st.sampled_from(keys), json_values),
    json_values
    | st.fixed_dictionaries(
        {
            "content": st.lists(
                st.fixed_dictionaries(
                    {"type": st.sampled_from(["text", "tool_use"])},
                    optional={
                        "text": st.text(st.characters()),
                        "name": st.text(st.characters()),
                        "input": json_values,
                    },
                )
            ),
            "usage": json_values,
        }
    ),
)
stream_bytes = st.lists(
    st.binary(max_size=40) | objects.map(lambda o: json.dumps(o).encode() + b"\n"), max_size=6
).map(b"".join)


@settings(max_examples=120, deadline=None)
@given(stream=stream_bytes, cuts=st.lists(st.integers(1, 50), max_size=20))
def test_any_bytes_are_read_without_an_error_and_come_out_as_utf8(
    stream: bytes, cuts: list[int]
) -> None:
    parser, splitter = StreamParser(), LineSplitter(200)
    said: list[Said] = []
    for size in [*cuts, len(stream)]:
        for line in splitter.feed(stream[:size]):
            said += parser.feed(line)
        stream = stream[size:]
    for line in splitter.flush():
        said += parser.feed(line)
    for item in said:
        item.text.encode()
        item.tool_input.encode()
        assert len(item.tool_input) <= 2000
    result = parser.result
    result.result.encode()
    result.error.encode()
    assert 0 <= result.input_tokens < 2**60
    assert 0.0 <= result.total_cost_usd < 1e9


# -- lines -------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    pieces=st.lists(st.binary(max_size=30) | st.sampled_from([b"\n", b"\r\n", "é".encode()])),
    limit=st.integers(4, 20),
)
def test_lines_are_the_same_however_the_bytes_are_cut_up(pieces: list[bytes], limit: int) -> None:
    whole = b"".join(pieces)
    at_once, in_pieces = LineSplitter(limit), LineSplitter(limit)
    expected = at_once.feed(whole) + at_once.flush()
    got = [line for piece in pieces for line in in_pieces.feed(piece)] + in_pieces.flush()
    assert got == expected
    assert all(len(line) <= limit for line in got)
    kept = whole.replace(b"\n", b"").replace(b"\r", b"")
    assert b"".join(got).replace(b"\r", b"") == kept


def test_a_long_line_is_cut_where_characters_end() -> None:
    splitter = LineSplitter(10)
    assert splitter.feed("aé€😀é€😀\n".encode()) == ["aé€😀".encode(), "é€😀".encode()]


def test_a_line_ending_is_not_part_of_a_line() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"a\r\nb\n\nc") == [b"a", b"b", b""]
    assert splitter.flush() == [b"c"]
    assert splitter.flush() == []


def test_a_long_line_in_one_piece_with_its_newline_is_cut_too() -> None:
    lines = LineSplitter(8).feed(b"x" * 20 + b"\nend\n")
    assert lines == [b"x" * 8, b"x" * 8, b"xxxx", b"end"]


@given(data=st.lists(st.binary(max_size=50)), limit=st.integers(0, 100))
def test_clip_never_cuts_a_character(data: list[bytes], limit: int) -> None:
    text = b"".join(data).decode(errors="replace")
    assert text.startswith(clip(text, limit))
    assert len(clip(text, limit).encode()) <= limit


def test_a_capture_keeps_the_first_bytes_of_each_stream() -> None:
    capture = Capture()
    for _ in range(40):
        capture.add("stdout", b"x" * 65536)
        capture.add("stderr", b"e")
    assert len(capture["stdout"]) == OUTPUT_LIMIT
    assert capture["stderr"] == b"e" * 40
    capture.add("other", b"no such stream")
    assert capture.cut


# -- the log -----------------------------------------------------------------------------------


class Kept:
    def __init__(self, limit: int = 1_000_000) -> None:
        self.lines: list[tuple[str, str, str]] = []
        self.cuts: list[str] = []
        self.log = RunLog(lambda *line: self.lines.append(line), self.cuts.append, limit)


def test_lines_of_streams_and_stages_do_not_mix() -> None:
    kept = Kept()
    kept.log.add("a", "stdout", b"one ")
    kept.log.add("a", "stderr", b"two\n")
    kept.log.add("b", "stdout", b"three")
    kept.log.add("a", "stdout", b"four\n")
    kept.log.flush("a")
    assert kept.lines == [("a", "stderr", "two"), ("a", "stdout", "one four")]
    kept.log.flush("b")
    assert kept.lines[2:] == [("b", "stdout", "three")]


def test_what_is_no_text_is_made_text() -> None:
    kept = Kept()
    kept.log.add("a", "stdout", b"\xff\xfe\0ok\n")
    assert kept.lines == [("a", "stdout", "\ufffd\ufffd\ufffdok")]


def test_a_line_of_ten_megabytes_is_cut_into_many() -> None:
    kept = Kept(limit=100_000_000)
    for _ in range(160):
        kept.log.add("a", "stdout", b"x" * 65536)
    kept.log.flush("a")
    assert sum(len(text) for _, _, text in kept.lines) == 160 * 65536
    assert {len(text) for _, _, text in kept.lines} == {LINE_LIMIT}


def test_the_cut_is_told_once_and_nothing_follows_it() -> None:
    kept = Kept(limit=5000)
    for number in range(1000):
        kept.log.add("a", "stdout", b"y" * (number % 40) + b"\n")
    kept.log.flush("a")
    assert kept.cuts == ["a"]
    assert len(kept.lines) < 10
    before = list(kept.lines)
    kept.log.add("b", "stdout", b"\n")
    assert kept.lines == before, "a short line after the cut would look as if nothing was cut"


def test_a_cut_at_the_last_line_without_newline_is_told_too() -> None:
    kept = Kept(limit=600)
    kept.log.add("a", "stdout", b"x" * 500)
    kept.log.flush("a")
    assert (kept.lines, kept.cuts) == ([], ["a"])


@settings(max_examples=200)
@given(
    writes=st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.sampled_from(["stdout", "stderr", "?"]),
            st.binary(max_size=80),
        )
    )
)
def test_any_output_makes_a_bounded_log_of_plain_lines(
    writes: list[tuple[str, str, bytes]],
) -> None:
    kept = Kept(limit=4000)
    for stage, stream, data in writes:
        kept.log.add(stage, stream, data)
    kept.log.flush("a")
    kept.log.flush("b")
    for _, _, text in kept.lines:
        text.encode()
        assert "\n" not in text
        assert "\0" not in text
    assert sum(len(text) for _, _, text in kept.lines) <= 4000
    assert len(kept.cuts) <= 1
