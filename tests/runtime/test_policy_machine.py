"""The policy against any order of events, checked by what a carrier would see."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from voidbus.actors.runtime.policy import (
    AddChild,
    ChildExited,
    ChildPolicy,
    ChildStarted,
    ChildStopped,
    Escalate,
    Event,
    ExitKind,
    ExitReason,
    Finished,
    RemoveChild,
    Restart,
    ScheduleTick,
    StartChild,
    StopAll,
    StopChild,
    Strategy,
    SupervisorPhase,
    SupervisorPolicy,
    Tick,
    decide,
    initial_state,
)


class PolicyMachine(RuleBasedStateMachine):
    """`alive` holds what the carrier has started and not yet reported as ended."""

    @initialize(
        strategy=st.sampled_from(Strategy),
        max_restarts=st.integers(0, 6),
        kinds=st.lists(st.sampled_from(Restart), max_size=4),
    )
    def set_up(self, strategy: Strategy, max_restarts: int, kinds: list[Restart]) -> None:
        self.policy = SupervisorPolicy(strategy, max_restarts, 10, 0.5, 4, 2, 0.2, 20)
        self.now = 0.0
        self.alive: dict[str, int] = {}
        self.up: set[str] = set()
        self.asked: dict[int, float] = {}
        self.generations: list[int] = []
        self.tick_at: float | None = None
        self.deadline: float | None = None
        self.added = len(kinds)
        self.over = False
        self.removing: set[str] = set()
        children = [ChildPolicy(f"c{i}", kind, 3) for i, kind in enumerate(kinds)]
        self.state = initial_state(self.policy, children)
        self.feed(Tick())

    def feed(self, event: Event) -> None:
        previous = self.state
        self.state, actions = decide(previous, event, self.now, 0.7)
        for action in actions:
            assert not self.over, "nothing follows the end"
            match action:
                case StartChild(name, generation):
                    self.check_start(name, generation)
                case StopChild(name, generation, timeout):
                    self.check_stop(name, generation, timeout)
                case ScheduleTick(at):
                    assert at > self.now
                    self.tick_at = at
                case Escalate() | Finished():
                    assert not self.alive
                    self.over = True
        recent = [at for at in self.state.restarts if self.now - at <= self.policy.window]
        assert len(recent) <= self.policy.max_restarts
        assert {c.name: c.generation for c in self.state.children if c.alive} == self.alive
        if self.state.phase is SupervisorPhase.RUNNING:
            self.check_nothing_is_forgotten()

    def check_start(self, name: str, generation: int) -> None:
        assert name not in self.alive, "never two generations at once"
        assert not self.generations or generation > self.generations[-1]
        assert self.state.phase is SupervisorPhase.RUNNING
        if self.policy.strategy is not Strategy.ONE_FOR_ONE:
            order = [c.name for c in self.state.children]
            earlier = self.state.children[: order.index(name)]
            assert all(c.name in self.up for c in earlier if c.wanted)
        self.generations.append(generation)
        self.alive[name] = generation

    def check_stop(self, name: str, generation: int, timeout: float) -> None:
        assert self.alive.get(name) == generation
        assert 0 <= timeout <= 3
        if self.deadline is not None:
            assert self.now + timeout <= max(self.deadline, self.now) + 1e-9
            # One that was being removed already is not begun here, only hurried.
            if self.now < self.deadline and generation not in self.asked:
                order = [c.name for c in self.state.children]
                later = order[order.index(name) + 1 :]
                waiting = set(later) & self.alive.keys()
                assert all(self.alive[one] in self.asked for one in waiting), "in reverse"
        if generation in self.asked:
            assert self.now + timeout <= self.asked[generation] + 1e-9, "only ever shortened"
        self.asked[generation] = self.now + timeout

    def check_nothing_is_forgotten(self) -> None:
        """Who is wanted but down waits for a start, a stop, or a timer under way."""
        down = any(c.wanted and not c.alive for c in self.state.children)
        busy = any(c.alive and c.name not in self.up for c in self.state.children)
        stopping = any(g in self.asked for g in self.alive.values())
        assert not down or busy or stopping or self.tick_at is not None

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.alive)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def a_child_is_up(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.up.add(name)
        self.feed(ChildStarted(name, self.alive[name]))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), kind=st.sampled_from(ExitKind))
    def a_child_exits(self, data: st.DataObject, kind: ExitKind) -> None:
        name = self.pick(data)
        self.up.discard(name)
        self.feed(ChildExited(name, self.alive.pop(name), ExitReason(kind)))

    @precondition(lambda self: set(self.alive.values()) & self.asked.keys())
    @rule(data=st.data())
    def a_stop_is_done(self, data: st.DataObject) -> None:
        asked = sorted(name for name, generation in self.alive.items() if generation in self.asked)
        name = data.draw(st.sampled_from(asked))
        self.up.discard(name)
        self.feed(ChildStopped(name, self.alive.pop(name)))

    @precondition(lambda self: self.generations)
    @rule(data=st.data())
    def a_stale_exit_arrives(self, data: st.DataObject) -> None:
        old = sorted(set(self.generations) - set(self.alive.values()))
        if old:
            before = self.state.children
            name = data.draw(st.sampled_from([f"c{i}" for i in range(self.added)]))
            fault = ExitReason(ExitKind.FAULT)
            self.feed(ChildExited(name, data.draw(st.sampled_from(old)), fault))
            assert self.state.children == before

    @rule(seconds=st.floats(0, 5))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.tick_at is not None and self.tick_at <= until and not self.over:
            self.now, self.tick_at = self.tick_at, None
            self.feed(Tick())
        self.now = until
        if self.deadline is not None and self.now > self.deadline:
            assert all(g in self.asked for g in self.alive.values()), "killed by the deadline"
            assert all(self.asked[g] <= self.deadline + 1e-9 for g in self.alive.values())

    @precondition(lambda self: self.state.phase is SupervisorPhase.RUNNING)
    @rule(kind=st.sampled_from(Restart), significant=st.booleans())
    def a_child_is_added(self, kind: Restart, significant: bool) -> None:
        name = f"c{self.added}"
        self.added += 1
        significant = significant and kind is not Restart.PERMANENT
        self.feed(AddChild(ChildPolicy(name, kind, 3, significant)))

    @precondition(lambda self: self.state.children)
    @rule(data=st.data())
    def a_child_is_removed(self, data: st.DataObject) -> None:
        if not self.over:
            name = data.draw(st.sampled_from([c.name for c in self.state.children]))
            self.feed(RemoveChild(name))

    @rule(seconds=st.floats(0, 8))
    def everything_is_to_stop(self, seconds: float) -> None:
        if not self.over:
            deadline = self.now + seconds
            self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)
            self.feed(StopAll(deadline))

    def teardown(self) -> None:
        """Whatever came before, a stop always comes to its end."""
        if not hasattr(self, "state") or self.over:
            return
        self.everything_is_to_stop(5)
        while self.alive:
            name = next(n for n, generation in self.alive.items() if generation in self.asked)
            self.up.discard(name)
            self.feed(ChildStopped(name, self.alive.pop(name)))
        assert self.over


TestPolicyMachine = PolicyMachine.TestCase
TestPolicyMachine.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)
