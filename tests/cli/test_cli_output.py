"""What is printed: safe, aligned, in plain words."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from fake_supervisor import event
from hypothesis import given
from hypothesis import strategies as st

from voidbus.cli.event_line import clock, event_line
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.given import INPUT_LIMIT, input_text
from voidbus.cli.output import duration, plain, plain_lines, print_json, seconds_since, size


@given(st.text())
def test_plain_text_has_nothing_a_terminal_acts_on(text: str) -> None:
    shown = plain(text)
    assert all(unicodedata.category(character) != "Cc" or character == "\t" for character in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert plain(shown) == shown


def test_plain_text_keeps_what_is_harmless() -> None:
    assert plain("grüße\t日本 ✓") == "grüße\t日本 ✓"
    assert plain_lines("a\nb\x1bc") == "a\nb\\x1bc"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.04, "0.0s"),
        (9.96, "10.0s"),
        (59.9, "59s"),
        (185, "3m05s"),
        (7800, "2h10m"),
        (349200, "4d01h"),
    ],
)
def test_a_duration_is_read_at_a_glance(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(min_value=0, max_value=1e8))
def test_a_duration_is_always_short(seconds: float) -> None:
    assert len(duration(seconds)) <= 8


def test_sizes_are_in_powers_of_1024() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 * 1024**2, 3 * 1024**4)] == [
        *("0B", "1023B", "1.0KiB", "5.0MiB", "3072.0GiB")
    ]


def test_times_with_nine_digits_of_fraction_are_read() -> None:
    start = "2026-01-01T00:00:00.123456789Z"
    took = seconds_since(start, "2026-01-01T00:00:02.623456789Z")
    assert took == pytest.approx(2.5)
    assert seconds_since("yesterday") is None
    assert seconds_since(None) is None


def test_an_event_is_one_line_whatever_is_in_it() -> None:
    line = event_line(event("run-a", 7, "box.started", "two\nlines", stage_name="a\x1b"))
    assert line == "    7 00:00:07.250 info  box.started        [a\\x1b] two\\nlines"
    assert clock(event("run-a", 7, "x").model_copy(update={"timestamp": "?"})) == ".000"


def test_json_is_ascii_so_that_every_locale_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", sink)
    print_json({"text": "grüße \x1b"})
    sink.flush()
    assert json.loads(sink.buffer.getvalue()) == {"text": "grüße \x1b"}


def test_input_that_cannot_be_read_is_wrong_usage(tmp_path: Path) -> None:
    assert input_text(None) is None
    assert input_text("as it is") == "as it is"
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "huge").write_bytes(b"x" * (INPUT_LIMIT + 1))
    for name, word in (("binary", "UTF-8"), ("huge", "over"), ("absent", "No such file")):
        with pytest.raises(Failure, match=word) as caught:
            input_text(f"@{tmp_path / name}")
        assert caught.value.code is ExitCode.USAGE
