"""The mailbox against a model of two lists."""

from __future__ import annotations

import actor_kit as kit
import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from voidbus.actors.runtime.mailbox import Item, Mailbox, Overflow
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message


class MailboxMachine(RuleBasedStateMachine):
    """Whatever is put, taken and closed, the mailbox does what two lists would."""

    @initialize(limit=st.integers(1, 4), overflow=st.sampled_from(Overflow))
    def make(self, limit: int, overflow: Overflow) -> None:
        self.limit, self.overflow = limit, overflow
        self.mailbox = Mailbox(limit, overflow)
        self.data: list[Item] = []
        self.control: list[Item] = []
        self.outcomes: list[Message] = []
        self.accepted = self.refused = self.shed = 0
        self.closed = False

    def count(self, reason: FaultReason | None) -> None:
        self.accepted += reason is None
        self.refused += reason is not None

    @rule(control=st.booleans(), waits=st.booleans())
    def put(self, control: bool, waits: bool) -> None:
        item = kit.delivery(kit.Say(), self.outcomes)
        waits = waits and not control
        got = self.mailbox.put_wait(item, 0) if waits else self.mailbox.put(item, control=control)
        expected: FaultReason | None = None
        if self.closed:
            expected = FaultReason.MAILBOX_CLOSED
        elif control:
            self.control.append(item)
        elif len(self.data) < self.limit:
            self.data.append(item)
        elif waits or self.overflow is Overflow.REFUSE:
            expected = FaultReason.MAILBOX_FULL
        else:
            self.data = [*self.data[1:], item]
            self.shed += 1
        assert got is expected
        self.count(expected)

    @rule()
    def get(self) -> None:
        lane = self.control or self.data
        assert self.mailbox.get(0) is (lane.pop(0) if lane else None)

    @precondition(lambda self: self.closed or len(self.data) + len(self.control) > 1)
    @rule()
    def close(self) -> None:
        assert self.mailbox.close() == [*self.control, *self.data]
        self.closed = True
        self.data, self.control = [], []

    @invariant()
    def the_statistics_agree(self) -> None:
        if not hasattr(self, "mailbox"):
            return
        s = self.mailbox.statistics()
        assert (s.depth, s.control_depth, s.limit) == (
            len(self.data),
            len(self.control),
            self.limit,
        )
        assert (s.accepted, s.refused, s.shed, s.closed) == (
            self.accepted,
            self.refused,
            self.shed,
            self.closed,
        )
        assert s.depth <= self.limit
        assert [o.reason for o in self.outcomes if isinstance(o, Fault)] == (
            [FaultReason.MAILBOX_FULL] * self.shed
        )


TestMailboxMachine = MailboxMachine.TestCase
TestMailboxMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
