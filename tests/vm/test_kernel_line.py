"""What a kernel is told arrives whole, or not at all."""

from __future__ import annotations

import pytest

from voidbus.vm.kernel_line import kernel_line, require_length


def test_the_arguments_are_the_last_words() -> None:
    line = kernel_line(["a=1", "b"])
    assert line.startswith("console=ttyS0 quiet ")
    assert line.endswith(" a=1 b")


@pytest.mark.parametrize("argument", ["a b", 'a"b', "a\\b", "a\nb", "é", "a\0"])
def test_an_argument_that_would_be_two_or_none_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="can't stand on a kernel's command line"):
        kernel_line([argument])


def test_a_line_that_would_be_cut_is_refused_with_what_to_do() -> None:
    require_length("a" * 2047, 2047)
    with pytest.raises(ValueError, match="of 2048 bytes is too long; use fewer mounts"):
        require_length("a" * 2048, 2047)
