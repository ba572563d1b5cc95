"""The stop ladder on real processes, each kept by a supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import actor_kit as kit
import pytest

from voidbus.actors.runtime.actor import Place, handles
from voidbus.actors.runtime.ladder import StopOutcome
from voidbus.actors.runtime.policy import (
    ChildPolicy,
    ExitKind,
    ExitReason,
    Restart,
    Strategy,
    SupervisorPolicy,
)
from voidbus.actors.runtime.process import ProcessIdentity
from voidbus.actors.runtime.process_child import ProcessChild
from voidbus.actors.runtime.spawned import SpawnedProcess
from voidbus.actors.runtime.spawner import Spawner
from voidbus.actors.runtime.supervisor import Child, ChildSpec, Supervisor
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery

POLICY = SupervisorPolicy(Strategy.ONE_FOR_ONE, 5, 60, 0, 0, 1, 0, 60)
KITS = str(Path(__file__).parents[1] / "kits")


class Keeper(Supervisor):
    """Keeps one process. `ask_to_end` is what its polite request does."""

    mailbox_limit = 32

    def __init__(self, place: Place, log: kit.Log, ask_to_end: Callable[[], None]) -> None:
        super().__init__(place, POLICY)
        self.log = log
        self.asked: list[float] = []
        self._do_ask = ask_to_end
        self.child = ProcessChild(self, self.ask_to_end)
        self.returncode: int | None = None

    def ask_to_end(self, seconds: float) -> None:
        self.asked.append(seconds)
        self._do_ask()

    def keep(self, stop_timeout: float) -> None:
        """Take charge of the child, whose process may not be there yet."""

        def never(_g: int, _r: Callable[[], None], _e: Callable[[ExitReason], None]) -> Child:
            raise AssertionError("it is temporary")

        policy = ChildPolicy("process", Restart.TEMPORARY, stop_timeout=stop_timeout)
        self.adopt_child(ChildSpec(policy, never), 1, self.child)

    def exited(self, returncode: int | None) -> None:
        self.returncode = returncode
        self.child.gone()
        self.child.gone()  # a second report has no effect
        outcome = self.child.stopped_by.outcome.value if self.child.stopped_by else "by itself"
        self.log.add(outcome)
        self.report_end("process", 1, ExitReason(ExitKind.NORMAL))

    @handles(kit.Say)
    def on_say(self, message: kit.Say, delivery: Delivery) -> kit.Answer:
        return kit.Answer(word=message.word)


class Scene:
    """A keeper, a spawner whose exits it hears of, and a clock."""

    def __init__(self, system: System, clock: kit.FakeClock, spawner_exits: list[Keeper]) -> None:
        self.system, self.clock, self.log = system, clock, kit.Log()
        self.polite: list[Callable[[], None]] = []
        self.keeper = system.start(
            Keeper, "keeper", self.log, lambda: [do() for do in self.polite] and None
        )
        spawner_exits.append(self.keeper)
        self.keeper.post(lambda: self.keeper.keep(5.0))

    def attach(self, spawned: SpawnedProcess) -> None:
        self.keeper.post(lambda: self.keeper.child.attach(spawned.handle))

    def stop(self, seconds: float) -> None:
        self.keeper.post(lambda: self.keeper.child.stop(seconds))
        self.settle()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.settle()

    def settle(self) -> None:
        """Until the keeper has run its timers. That it answers at all is part of the promise."""
        for word in ("first", "second"):
            question = kit.ask(self.system, "keeper", kit.Say(word=word))
            assert kit.reply(question, kit.Answer).word == word

    def ended(self) -> str:
        self.log.wait_count(1)
        return self.log.lines[0]


@pytest.fixture
def keepers() -> list[Keeper]:
    return []


@pytest.fixture
def spawner(keepers: list[Keeper], monkeypatch: pytest.MonkeyPatch) -> Iterator[Spawner]:
    monkeypatch.setenv("PYTHONPATH", KITS)

    def exited(_identity: ProcessIdentity, returncode: int | None) -> None:
        (keeper,) = keepers
        keeper.post(lambda: keeper.exited(returncode))

    with Spawner(on_exit=exited, preload=["stop_entries", "run_entries"]) as made:
        made.start()
        yield made
    with pytest.raises(ChildProcessError):  # nothing runs and nothing is a zombie
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def scene(keepers: list[Keeper], spawner: Spawner) -> Iterator[Scene]:
    clock = kit.FakeClock()
    with kit.local_system(clock) as system:
        yield Scene(system, clock, keepers)


def spawn_ready(spawner: Spawner, entry: str, tmp_path: Path) -> SpawnedProcess:
    """Start a process of `stop_entries`; returns when it has said it is ready."""
    fifo = tmp_path / "ready"
    os.mkfifo(fifo)
    spawned = spawner.spawn(f"stop_entries:{entry}", str(fifo).encode())
    with fifo.open("rb") as pipe:
        assert pipe.read() == b"ready"
    return spawned


def test_a_process_that_ends_when_asked_was_drained(
    scene: Scene, spawner: Spawner, tmp_path: Path
) -> None:
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    spawned = spawner.spawn("run_entries:waits_for_the_end_of_a_pipe", str(fifo).encode())
    held = fifo.open("wb", buffering=0)
    with contextlib.closing(held):
        scene.polite.append(held.close)
        scene.attach(spawned)
        scene.stop(10.0)
        assert scene.ended() == StopOutcome.DRAINED
    assert scene.keeper.returncode == 5
    assert scene.keeper.asked == [pytest.approx(8.0)]  # the drain has four fifths of the time


def test_a_process_that_does_not_listen_is_terminated_after_the_drain(
    scene: Scene, spawner: Spawner, tmp_path: Path
) -> None:
    scene.attach(spawn_ready(spawner, "ends_when_terminated", tmp_path))
    scene.stop(10.0)
    scene.advance(7.9)
    assert scene.log.lines == []
    scene.advance(0.1)
    assert scene.ended() == StopOutcome.TERMINATED
    assert scene.keeper.returncode == -signal.SIGTERM
    done = scene.keeper.child.stopped_by
    assert done is not None
    assert done.elapsed == pytest.approx(8.0)


def test_a_process_that_ignores_being_terminated_is_killed(
    scene: Scene, spawner: Spawner, tmp_path: Path
) -> None:
    scene.attach(spawn_ready(spawner, "ignores_terminate", tmp_path))
    scene.stop(10.0)
    scene.advance(8.0)
    scene.advance(0.9)
    assert scene.log.lines == []
    scene.advance(0.1)
    assert scene.ended() == StopOutcome.KILLED
    assert scene.keeper.returncode == -signal.SIGKILL


def test_a_stop_without_time_kills_at_once(scene: Scene, spawner: Spawner, tmp_path: Path) -> None:
    scene.attach(spawn_ready(spawner, "ignores_terminate", tmp_path))
    scene.stop(0.0)
    assert scene.ended() == StopOutcome.KILLED
    assert scene.keeper.asked == []


def test_a_second_stop_shortens_the_first_and_never_lengthens_it(
    scene: Scene, spawner: Spawner, tmp_path: Path
) -> None:
    scene.attach(spawn_ready(spawner, "ignores_terminate", tmp_path))
    scene.stop(1000.0)
    scene.stop(10.0)
    scene.stop(500.0)
    scene.advance(8.0)
    scene.stop(0.0)
    assert scene.ended() == StopOutcome.KILLED
    assert len(scene.keeper.asked) == 1, "it was asked once"


def test_a_stop_before_the_process_is_there_is_carried_out_when_it_comes(
    scene: Scene, spawner: Spawner, tmp_path: Path
) -> None:
    scene.stop(10.0)
    assert scene.keeper.asked == [], "there is nobody to ask"
    scene.advance(2.0)
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    spawned = spawner.spawn("run_entries:waits_for_the_end_of_a_pipe", str(fifo).encode())
    held = fifo.open("wb", buffering=0)
    with contextlib.closing(held):
        scene.polite.append(held.close)
        scene.attach(spawned)
        assert scene.ended() == StopOutcome.DRAINED
    assert scene.keeper.asked == [pytest.approx(6.0)]


@pytest.mark.parametrize(
    ("late", "outcome"), [(8.5, StopOutcome.TERMINATED), (9.5, StopOutcome.KILLED)]
)
def test_a_process_that_comes_late_meets_the_step_its_stop_is_on(
    scene: Scene, spawner: Spawner, tmp_path: Path, late: float, outcome: StopOutcome
) -> None:
    scene.stop(10.0)
    scene.advance(late)
    scene.attach(spawn_ready(spawner, "ends_when_terminated", tmp_path))
    assert scene.ended() == outcome
    assert scene.keeper.asked == []


def test_a_process_that_ended_by_itself_was_not_stopped_and_is_not_signalled_again(
    scene: Scene, spawner: Spawner
) -> None:
    scene.attach(spawner.spawn("run_entries:exits_with", b"3"))
    assert scene.ended() == "by itself"
    assert scene.keeper.returncode == 3
    scene.stop(10.0)
    scene.stop(0.0)
    assert scene.keeper.asked == []
    assert scene.keeper.exit_reason is None


def test_a_process_killed_by_something_else_during_the_drain_counts_as_drained(
    scene: Scene, spawner: Spawner, tmp_path: Path
) -> None:
    spawned = spawn_ready(spawner, "ignores_terminate", tmp_path)
    scene.attach(spawned)
    scene.polite.append(lambda: os.kill(spawned.identity.pid, signal.SIGKILL))
    scene.stop(10.0)
    assert scene.ended() == StopOutcome.DRAINED


def test_a_supervisor_that_stops_brings_its_process_down_with_it(
    scene: Scene, spawner: Spawner, tmp_path: Path
) -> None:
    scene.attach(spawn_ready(spawner, "ends_when_terminated", tmp_path))
    scene.keeper.request_stop(100.0)
    scene.settle()
    scene.advance(4.0)  # its own 5 s: four fifths of them
    assert scene.ended() == StopOutcome.TERMINATED
    assert scene.keeper.join(kit.PATIENCE)


def test_a_supervisor_that_fails_leaves_its_process_to_the_next(
    scene: Scene, spawner: Spawner, tmp_path: Path
) -> None:
    spawned = spawn_ready(spawner, "ignores_terminate", tmp_path)
    scene.attach(spawned)

    def fail() -> None:
        raise RuntimeError("the keeper itself")

    scene.keeper.post(fail)
    assert scene.keeper.join(kit.PATIENCE)
    assert spawned.handle.alive()
    spawned.handle.signal(signal.SIGKILL)
    assert spawned.handle.wait(kit.PATIENCE)
    spawned.handle.close()


def test_the_handle_of_a_process_that_comes_after_its_end_was_told_is_closed(
    scene: Scene, spawner: Spawner
) -> None:
    """Its starting job may be slower than the watcher that saw it end."""
    child = ProcessChild(scene.keeper, lambda _: None)
    child.gone()
    spawned = spawner.spawn("run_entries:exits_with", b"0")
    child.attach(spawned.handle)
    with pytest.raises(ValueError, match="closed"):
        spawned.handle.fileno()
    assert scene.ended() == "by itself"
