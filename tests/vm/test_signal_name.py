from __future__ import annotations

import pytest

from voidbus.vm.signal_name import signal_name


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "signal 40"), (99, "signal 99")])
def test_every_signal_has_a_name(number: int, name: str) -> None:
    assert signal_name(number) == name
