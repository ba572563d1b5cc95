"""voidbus's own files for guests are read once, before anybody asks for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from voidbus.vm.image import own_files as module
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.own_files import own_files
from voidbus.vm.image.product import read_product


@pytest.fixture
def anew() -> Iterator[None]:
    """As in a process that has not read them."""
    own_files.cache_clear()
    yield
    own_files.cache_clear()
    own_files()


def test_they_are_read_when_the_module_is_imported() -> None:
    program = "from voidbus.vm.image.own_files import own_files; print(own_files.cache_info())"
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "currsize=1" in said.stdout
    assert own_files().digest == read_product().digest


def test_files_that_can_not_be_read_are_told_and_tried_again(
    anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(module, "read_product", fail)
        with pytest.raises(ImageError, match=r"can't be read: .*denied; install it again"):
            own_files()
    assert own_files().sources
