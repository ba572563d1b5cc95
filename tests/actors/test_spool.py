"""The spool hands out batches in order, from memory or from disk, and survives its writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from journal_kit import a_batch

from voidbus.actors.messages.journal import RunOutcome
from voidbus.actors.messages.runs import RunStatus
from voidbus.actors.spool import Spool, read_leftovers


def drain(spool: Spool) -> list[int]:
    numbers: list[int] = []
    while (batch := spool.next()) is not None:
        numbers.extend(event.seq for event in batch.events)
        spool.done()
    return numbers


def test_batches_come_out_in_the_order_they_went_in(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for number in range(5):
        spool.add(a_batch(first=number))
    assert spool.waiting == 5
    assert drain(spool) == [0, 1, 2, 3, 4]
    assert spool.waiting == 0
    spool.close()


def test_a_batch_stays_until_it_is_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.add(a_batch(first=0))
    assert spool.next() == spool.next()
    spool.close()


def test_more_than_memory_holds_is_read_again_from_the_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for number in range(2000):
        spool.add(a_batch(first=number))
    assert len(spool._tail) <= 256
    assert drain(spool) == list(range(2000))
    for number in range(2000, 2010):
        spool.add(a_batch(first=number))
    assert drain(spool) == list(range(2000, 2010))
    spool.close()


def test_adding_while_the_file_is_read_keeps_the_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for number in range(300):
        spool.add(a_batch(first=number))
    taken = []
    for number in range(300, 900):
        batch = spool.next()
        assert batch is not None
        taken.append(batch.events[0].seq)
        spool.done()
        spool.add(a_batch(first=number))
    assert taken + drain(spool) == list(range(900))
    spool.close()


def test_the_file_starts_anew_once_all_of_it_is_journaled(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = Spool(path)
    for number in range(0, 12000, 400):
        spool.add(a_batch(first=number, count=400))
    assert path.stat().st_size > 4 * 1024 * 1024
    drain(spool)
    assert path.stat().st_size == 0
    spool.add(a_batch(first=12000))
    assert drain(spool) == [12000]
    spool.close()


def test_what_the_journal_lacks_is_read_after_the_writer_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = Spool(path)
    for number in range(0, 9, 3):
        spool.add(a_batch(first=number, count=3))
    spool.add(a_batch(first=9, outcome=RunOutcome(status=RunStatus.SUCCEEDED)))
    spool.close()
    leftovers = read_leftovers(path, "r1", after=4)
    assert [event.seq for batch in leftovers for event in batch.events] == [5, 6, 7, 8, 9, 10]
    assert leftovers[-1].outcome is not None


def test_a_line_cut_short_by_a_kill_ends_the_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = Spool(path)
    spool.add(a_batch(first=0, count=2))
    spool.add(a_batch(first=2, count=2))
    spool.close()
    os.truncate(path, path.stat().st_size - 7)
    leftovers = read_leftovers(path, "r1", after=-1)
    assert [event.seq for batch in leftovers for event in batch.events] == [0, 1]


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe\n", b"[1]\n" * 5, b"{" * 10000])
def test_a_spool_of_garbage_has_no_leftovers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spool"
    path.write_bytes(content)
    assert read_leftovers(path, "r1", after=-1) == []


def test_events_of_another_run_are_not_believed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.add(a_batch("other", first=0))
    spool.close()
    assert read_leftovers(tmp_path / "spool", "r1", after=-1) == []


def test_a_full_disk_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "spool")
    spool.add(a_batch(first=0))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:10]))
    with pytest.raises(OSError, match="no space") as caught:
        spool.add(a_batch(first=1))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    spool.add(a_batch(first=1))
    assert drain(spool) == [0, 1]
    spool.close()
