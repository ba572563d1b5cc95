"""Intents are taken away only from a run whose client was there to take them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_kit import ApiHouse, agent
from http_kit import PATIENCE, HttpClient

from voidbus.actors.messages.actor import Done
from voidbus.actors.messages.sidecar import AcknowledgeIntents, Intent, IntentList, ReadIntents
from voidbus.gateway.patience import Patience
from voidbus.gateway.server import Door, Server
from voidbus.transport.access import inproc_endpoints
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.hub import Hub


def intent(number: int) -> Intent:
    return Intent(
        intent_id=f"int-{number:04d}",
        from_candidate_id="r",
        iteration=0,
        kind="signal",
        audience="leader",
        payload={"n": number},
        priority="low",
        ttl_iterations=2,
    )


class Sidecar:
    """In place of the runs actor: `count` intents, two at a time. Reading beyond `fails_at` fails,
    and is answered when `go` says so."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.waiting = [intent(number) for number in range(count)]
        self.fails_at = fails_at
        self.asked, self.go, self.answered = (threading.Event() for _ in range(3))
        self.go.set()

    @property
    def ids(self) -> list[str]:
        return [each.intent_id for each in self.waiting]

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        threading.Thread(target=self._answer, args=(delivery,)).start()
        return None

    def _answer(self, delivery: Delivery) -> None:
        message = delivery.message
        if isinstance(message, AcknowledgeIntents):
            self.waiting = [i for i in self.waiting if i.intent_id not in message.intent_ids]
            delivery.reply(Done())
            return
        assert isinstance(message, ReadIntents)
        assert not message.drain
        self.asked.set()
        assert self.go.wait(PATIENCE)
        if self.fails_at is not None and message.offset >= self.fails_at:
            delivery.fail(FaultReason.LINK_LOST, "the run process is gone")
        else:
            page = tuple(self.waiting[message.offset : message.offset + 2])
            delivery.reply(IntentList(run_id=message.run_id, intents=page))
        self.answered.set()


@contextlib.contextmanager
def served(folder: Path, sidecar: Sidecar, *, tcp: bool = False) -> Iterator[HttpClient]:
    """The API alone, with this behind it."""
    with contextlib.ExitStack() as stack:
        hub = Hub("supervisor", inproc_endpoints(f"intents-{folder.name}"))
        stack.callback(hub.close)
        hub.attach("runs", sidecar)
        family = socket.AF_INET if tcp else socket.AF_UNIX
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.bind(("127.0.0.1", 0) if tcp else str(folder / "api"))
        listener.listen()
        server = Server(hub, [Door(listener)], "0", Patience())
        server.start()
        stack.callback(server.stop, 10)
        yield HttpClient(listener.getsockname() if tcp else folder / "api")


def test_all_intents_are_sent_and_then_taken_away(tmp_path: Path) -> None:
    sidecar = Sidecar(5)
    every = sidecar.ids
    with served(tmp_path, sidecar) as client:
        answer = client.get("/v1/runs/r/intents")
        assert [each["intent_id"] for each in answer.json] == every
        client.get("/v1/runs/r/intents")  # whoever asks next waits until they are
        assert sidecar.ids == []


def test_what_was_read_before_a_fault_is_sent_and_the_rest_still_waits(tmp_path: Path) -> None:
    sidecar = Sidecar(5, fails_at=4)
    every = sidecar.ids
    with served(tmp_path, sidecar) as client:
        answer = client.get("/v1/runs/r/intents")
        assert (answer.status, [i["intent_id"] for i in answer.json]) == (200, every[:4])
        sidecar.fails_at = None
        assert [i["intent_id"] for i in client.get("/v1/runs/r/intents").json] == every[4:]


def test_a_fault_before_anything_was_read_is_the_answer(tmp_path: Path) -> None:
    sidecar = Sidecar(5, fails_at=0)
    with served(tmp_path, sidecar) as client:
        assert client.get("/v1/runs/r/intents").status == 500
    assert len(sidecar.waiting) == 5


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_client_that_has_gone_takes_nothing(tmp_path: Path, tcp: bool) -> None:
    sidecar = Sidecar(5)
    every = sidecar.ids
    sidecar.go.clear()
    with served(tmp_path, sidecar, tcp=tcp) as client:
        with client.connect() as sock:
            sock.sendall(client.head_bytes("GET /v1/runs/r/intents HTTP/1.1"))
            assert sidecar.asked.wait(PATIENCE)
        sidecar.go.set()
        assert sidecar.answered.wait(PATIENCE)
        assert [i["intent_id"] for i in client.get("/v1/runs/r/intents").json] == every


def test_a_client_that_will_send_no_more_takes_them(tmp_path: Path) -> None:
    for tcp in (False, True):
        sidecar = Sidecar(3)
        folder = tmp_path / str(tcp)
        folder.mkdir()
        with served(folder, sidecar, tcp=tcp) as client:
            received = client.raw(client.head_bytes("GET /v1/runs/r/intents HTTP/1.1"), shut=True)
            assert b"int-0002" in received
            client.get("/v1/runs/r/intents")
            assert sidecar.ids == []


def test_who_only_asks_for_the_head_takes_nothing(door: HttpClient, tmp_path: Path) -> None:
    run_id = door.finish(agent(tmp_path, CLAUDIO_INTENTS="2"))["id"]
    path = f"/v1/runs/{run_id}/intents"
    assert door.ask("HEAD", path).status == 200
    assert len(door.get(path).json) == 2
    assert door.get(path).json == []


def test_clients_that_ask_at_once_get_every_intent_once(
    house: ApiHouse, door: HttpClient, tmp_path: Path
) -> None:
    run_id = door.finish(agent(tmp_path, CLAUDIO_INTENTS="3"))["id"]
    taken: list[str] = []

    def take() -> None:
        answer = door.get(f"/v1/runs/{run_id}/intents")
        taken.extend(each["intent_id"] for each in answer.json)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 3
