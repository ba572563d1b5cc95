"""A capability this machine lacks is a skip that names it, or a failure where it is required."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"

TEST = """
import pytest

@pytest.mark.needs("root")
def test_it():
    pass
"""


@pytest.mark.parametrize(
    ("required", "passed", "skipped", "failed"),
    [("", 0, 1, 0), ("kvm", 0, 1, 0), ("root", 0, 0, 1), ("all", 0, 0, 1)],
)
def test_a_missing_capability_skips_or_fails_as_required(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    required: str,
    passed: int,
    skipped: int,
    failed: int,
) -> None:
    monkeypatch.setenv("VOIDBUS_REQUIRE", required)
    lacking = CONFTEST.read_text().replace('"root": lambda: os.geteuid() == 0', '"root": bool')
    pytester.makeconftest(lacking)
    pytester.makeini("[pytest]\nmarkers =\n    needs(capability): needed\n")
    pytester.makepyfile(TEST)
    outcomes = pytester.runpytest("-p", "no:cacheprovider").parseoutcomes()
    assert outcomes.get("passed", 0) == passed
    assert outcomes.get("skipped", 0) == skipped
    # A failure in a test's set-up is an error in pytest's count.
    assert outcomes.get("errors", 0) + outcomes.get("failed", 0) == failed
