"""A machine's console: from its run while it lives, from what was kept of it afterwards."""

from __future__ import annotations

from pathlib import Path

from voidbus.actors.console_file import KEPT, read_console
from voidbus.actors.messages.runs import ConsoleText, ReadConsole, is_run_id, run_node
from voidbus.actors.run import RUN_PATH
from voidbus.actors.runtime.actor import Actor
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message

_ASK_TIMEOUT = 10.0


class ConsoleDoor:
    """Used by one actor, in its thread."""

    def __init__(self, actor: Actor, runs_dir: Path) -> None:
        self._actor = actor
        self._runs_dir = runs_dir

    def pass_on(self, message: ReadConsole, delivery: Delivery, *, alive: bool) -> None:
        """Answer `delivery` with the console of a run, whose machine may be gone."""
        if not alive:
            self._read_kept(message.run_id, delivery)
            return

        def answered(outcome: Message) -> None:
            if isinstance(outcome, Fault):
                self._read_kept(message.run_id, delivery)
            else:
                delivery.reply(outcome)

        self._actor.ask(
            f"{run_node(message.run_id)}/{RUN_PATH}", message, answered, timeout=_ASK_TIMEOUT
        )

    def _read_kept(self, run_id: str, delivery: Delivery) -> None:
        def read(outcome: bytes | Exception) -> None:
            if isinstance(outcome, bytes):
                delivery.reply(ConsoleText(text=outcome.decode(errors="replace")))
            else:
                delivery.fail(
                    FaultReason.FAILED,
                    f"no console of run {run_id} was kept: it had no machine, or {KEPT} others "
                    f"have ended since. Its events say what became of it: voidbus events {run_id}",
                )

        if not is_run_id(run_id):  # it becomes a path
            delivery.fail(FaultReason.INVALID, "that is no run id")
            return
        self._actor.work(
            lambda: read_console(self._runs_dir, run_id), read, name=f"console-{run_id}"
        )
