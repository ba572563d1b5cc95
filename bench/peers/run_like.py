"""A process like a run's: one leaf on the supervisor's work endpoint, with an actor that answers.

`main` is the other process's, with its URL and TOKEN as arguments; it ends when its standard input
does.
"""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Self

from kit.measure import import_from_bench

from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.system import System
from voidbus.transport.access import ipc_endpoints, secure_directory
from voidbus.transport.admission import token_digest
from voidbus.transport.delivery import Delivery
from voidbus.transport.hub import Hub
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Message, Right

NODE = "run-bench"
GENERATION = 1
READY = b"ready\n"
_PATIENCE = 20.0
_MAIN = "from peers.run_like import main; main()"


class Note(Message, tag="bench.note"):
    text: str


class Work(Message, tag="bench.work"):
    """Takes the receiver a millisecond."""

    text: str


class Tally(Message, tag="bench.tally"):
    """How much work was handled?"""


class Tallied(Message, tag="bench.tallied"):
    handled: int


class Echo(Actor):
    mailbox_limit = 2_000

    @handles(Note)
    def on_note(self, message: Note, delivery: Delivery) -> Note:
        return message


class Worker(Actor):
    """A receiver that is slow; asked for its tally past what waits."""

    mailbox_limit = 1_000
    control = frozenset({Tally})

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.done = 0
        self._pause = threading.Event()

    @handles(Work)
    def on_work(self, message: Work, delivery: Delivery) -> None:
        self._pause.wait(0.001)
        self.done += 1

    @handles(Tally)
    def on_tally(self, message: Tally, delivery: Delivery) -> Tallied:
        return Tallied(handled=self.done)


class RunLike:
    """The hub here and the process there, linked. A context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vb-")
        endpoints = ipc_endpoints(secure_directory(Path(self._folder.name) / "bus"))
        joined = threading.Event()
        self.hub = Hub("supervisor", endpoints, on_join=lambda _: joined.set())
        self.hub.expect(NODE, token_digest("bench"), GENERATION)
        import_from_bench()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, endpoints.rights[Right.WORK], "bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        # A link is there before what it leads to: the actors are started by its other end.
        if not joined.wait(_PATIENCE) or not self._actors_are_there():
            self.close()
            raise TimeoutError("the run-like process did not join")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _actors_are_there(self) -> bool:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], _PATIENCE)
        return bool(readable) and self.process.stdout.readline() == READY

    def close(self) -> None:
        self.process.communicate(timeout=_PATIENCE)
        self.hub.close()
        self._folder.cleanup()


def main() -> None:
    url, token = sys.argv[1:]
    leaf = Leaf(NODE, url, token=token, generation=GENERATION)
    system = System(leaf)
    system.start(Echo, "echo")
    system.start(Worker, "worker")
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    sys.stdin.buffer.read()
    system.stop(5.0)
    leaf.close()
