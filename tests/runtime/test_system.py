"""The system: starting at a path, inspection from outside, callbacks, and coming to an end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import actor_kit as kit
import pytest

from voidbus.actors.messages.actor import (
    ActorStatus,
    Inspect,
    InspectSystem,
    SystemStatus,
    Terminated,
)
from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.policy import (
    ChildPolicy,
    ExitKind,
    ExitReason,
    Restart,
    Strategy,
    SupervisorPolicy,
)
from voidbus.actors.runtime.supervisor import Supervisor, actor_child
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


class Plain(Actor):
    mailbox_limit = 4

    @handles(kit.Say)
    def on_say(self, message: kit.Say, delivery: Delivery) -> kit.Answer:
        return kit.Answer(word=message.word)

    @handles(kit.Crash)
    def on_crash(self, message: kit.Crash, delivery: Delivery) -> None:
        raise RuntimeError("boom")


class Blocking(Actor):
    """Blocks at its first message until it is let go."""

    mailbox_limit = 4

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.blocked, self.let_go = threading.Event(), threading.Event()

    @handles(kit.Say)
    def on_say(self, message: kit.Say, delivery: Delivery) -> None:
        self.blocked.set()
        assert self.let_go.wait(kit.PATIENCE)


class Unmade(Plain):
    def __init__(self, place: Place) -> None:
        raise RuntimeError("no such luck")


def test_a_path_is_taken_while_its_actor_lives(system: System) -> None:
    actor = system.start(Plain, "plain")
    with pytest.raises(ValueError, match="an actor lives at plain"):
        system.start(Plain, "plain")
    assert kit.reply(kit.ask(system, "plain", kit.Say(word="a")), kit.Answer).word == "a"
    actor.request_stop(1.0)
    assert actor.join(kit.PATIENCE)
    again = system.start(Plain, "plain")
    assert again.generation == 2


def test_a_path_that_is_no_actors_but_is_taken_stays_whose_it_was(system: System) -> None:
    with pytest.raises(ValueError, match="attached already"):
        system.start(Plain, "system")
    assert system.find("system") is None
    kit.reply(kit.ask(system, "system", Inspect()), SystemStatus)


def test_only_one_of_many_who_start_at_one_path_at_once_succeeds(system: System) -> None:
    for round_ in range(30):
        barrier, outcomes = threading.Barrier(4), list[bool]()

        def start(
            path: str = f"plain{round_}",
            barrier: threading.Barrier = barrier,
            outcomes: list[bool] = outcomes,
        ) -> None:
            barrier.wait(kit.PATIENCE)
            try:
                system.start(Plain, path)
            except ValueError:
                outcomes.append(False)
            else:
                outcomes.append(True)

        threads = [threading.Thread(target=start) for _ in range(4)]
        with kit.switching_every(1e-6):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(kit.PATIENCE)
        assert sorted(outcomes) == [False, False, False, True]
        kit.reply(kit.ask(system, f"plain{round_}", kit.Say()), kit.Answer)


def test_an_actor_whose_constructor_fails_leaves_nothing_behind(system: System) -> None:
    called: list[object] = []
    with pytest.raises(RuntimeError, match="no such luck"):
        system.start(Unmade, "unmade", on_ready=lambda: called.append(1), on_end=called.append)
    assert called == []
    assert kit.fault(kit.ask(system, "unmade", kit.Say())) is FaultReason.NO_SUCH_ACTOR
    system.start(Plain, "unmade")
    status = system.status("unmade")
    assert (status.restarts, status.last_fault) == (1, "RuntimeError: no such luck")


def test_an_actor_whose_thread_can_not_start_leaves_nothing_behind(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = []

    def no_thread(actor: Actor) -> None:
        questions.append(kit.ask(system, actor.path, kit.Say()))
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Actor, "_start_actor_loop", no_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            system.start(Plain, "plain")
    assert kit.fault(questions[0]) is FaultReason.MAILBOX_CLOSED
    system.start(Plain, "plain")
    kit.reply(kit.ask(system, "plain", kit.Say()), kit.Answer)


def test_who_watched_an_actor_that_could_not_be_made_is_told(system: System) -> None:
    log = kit.Log()

    class Watcher(Plain):
        @handles(Terminated)
        def on_terminated(self, message: Terminated, delivery: Delivery) -> None:
            log.add(f"{message.path} {message.reason}")

    class Watched(Plain):
        def __init__(self, place: Place) -> None:
            place.system.watch(place.path, "watcher")
            raise RuntimeError("not made")

    system.start(Watcher, "watcher")
    with pytest.raises(RuntimeError, match="not made"):
        system.start(Watched, "watched")
    log.wait_for("watched fault")


def test_callbacks_that_fail_are_logged_and_harm_nobody(
    system: System, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("callback")

    actor = system.start(Plain, "plain", on_ready=fails, on_end=fails)
    kit.reply(kit.ask(system, "plain", kit.Say()), kit.Answer)
    actor.request_stop(1.0)
    assert actor.join(kit.PATIENCE)
    assert [record.message for record in caplog.records] == [
        "plain: who waited for its start failed",
        "plain: who waited for its end failed",
    ]


def test_the_system_answers_for_actors_that_do_not(system: System) -> None:
    actor = system.start(Blocking, "blocking")
    system.node.tell("here/blocking", kit.Say())
    assert actor.blocked.wait(kit.PATIENCE)
    system.node.tell("here/blocking", kit.Say())
    for question in (InspectSystem(), Inspect()):
        status = kit.reply(kit.ask(system, "system", question), SystemStatus)
        (one,) = status.actors
        assert (one.path, one.depth, one.state, one.handled) == ("blocking", 1, "running", 1)
        assert one.head_age >= 0
        assert status.node == "here"
    own = kit.ask(system, "blocking", Inspect(), timeout=0.05)
    assert kit.fault(own) is FaultReason.EXPIRED
    actor.let_go.set()


def test_the_system_answers_inspection_only(system: System) -> None:
    assert kit.fault(kit.ask(system, "system", kit.Say())) is FaultReason.UNHANDLED


def test_a_restarted_actor_reports_its_restarts_and_its_last_fault(system: System) -> None:
    ends: list[ExitReason] = []
    for _ in range(2):
        actor = system.start(Plain, "plain", on_end=ends.append)
        kit.ask(system, "plain", kit.Crash())
        assert actor.join(kit.PATIENCE)
    system.start(Plain, "plain")
    status = kit.reply(kit.ask(system, "plain", Inspect()), ActorStatus)
    assert (status.restarts, status.last_fault, status.generation) == (2, "RuntimeError: boom", 3)
    assert [end.kind for end in ends] == [ExitKind.FAULT] * 2


def test_a_forgotten_path_has_no_history_and_a_living_one_is_not_forgotten(
    system: System,
) -> None:
    actor = system.start(Plain, "plain", generation=7)
    system.forget("plain")
    actor.request_stop(1.0)
    assert actor.join(kit.PATIENCE)
    assert system.start(Plain, "plain").generation == 8
    system.stop(kit.PATIENCE)
    system.forget("plain")
    assert system.start(Plain, "plain").generation == 1


def test_the_status_of_nobody_is_an_error(system: System) -> None:
    with pytest.raises(LookupError, match="no actor lives at nowhere"):
        system.status("nowhere")


def test_tell_wait_waits_for_room_and_says_when_nobody_is_there(system: System) -> None:
    assert (
        system.tell_wait("nobody", kit.Say(), sender="kit", timeout=1.0)
        is FaultReason.NO_SUCH_ACTOR
    )
    actor = system.start(Blocking, "blocking")
    system.node.tell("here/blocking", kit.Say())
    assert actor.blocked.wait(kit.PATIENCE)
    for _ in range(Blocking.mailbox_limit):
        assert system.tell_wait("blocking", kit.Say(), sender="kit", timeout=1.0) is None
    full = system.tell_wait("blocking", kit.Say(), sender="kit", timeout=0.01)
    assert full is FaultReason.MAILBOX_FULL
    actor.let_go.set()
    assert system.tell_wait("blocking", kit.Say(), sender="kit", timeout=kit.PATIENCE) is None


def test_a_system_stops_children_by_their_supervisor_in_reverse_order(system: System) -> None:
    log = kit.Log()

    class Leaf(Plain):
        def on_stop(self) -> None:
            log.add(self.path)

    policy = SupervisorPolicy(Strategy.ONE_FOR_ONE, 3, 10, 0, 0, 1, 0, 60)
    children = tuple(
        actor_child(system, ChildPolicy(name, Restart.PERMANENT, stop_timeout=5.0), Leaf)
        for name in "abcd"
    )

    class Top(Supervisor):
        def on_stop(self) -> None:
            log.add("top")

    top = system.start(Top, "top", policy, children)
    # Until all are up: each comes after the one before.
    while system.find("d") is None:
        kit.reply(kit.ask(system, "top", Inspect()), ActorStatus)
    assert system.stop(kit.PATIENCE)
    assert log.lines == ["d", "c", "b", "a", "top"]
    assert not top.actor_ref.is_alive()


def test_a_supervised_actor_whose_supervisor_does_not_stop_it_is_stopped_after_all(
    system: System,
) -> None:
    ends: list[ExitReason] = []
    system.start(Plain, "left", supervised=True, on_end=ends.append)
    assert system.stop(0.5)
    assert [end.kind for end in ends] == [ExitKind.SHUTDOWN]


def test_a_stop_gives_up_on_an_actor_that_is_stuck(system: System) -> None:
    stuck = system.start(Blocking, "stuck")
    system.start(Plain, "plain")
    system.node.tell("here/stuck", kit.Say())
    assert stuck.blocked.wait(kit.PATIENCE)
    assert not system.stop(0.1)
    assert system.find("plain") is None
    stuck.let_go.set()
    assert system.wait_empty(kit.PATIENCE)
