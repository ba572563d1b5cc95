"""Endpoints for other machines, beside those of this host: keys, rights, topics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from transport_kit import Answer, Change, Echo, Look, Signal

from voidbus.transport.access import AccessError, ClientKeys, ipc_endpoints, secure_directory
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Right
from voidbus.transport.remote import (
    load_client_keys,
    make_client_keys,
    make_server_keys,
    remote_endpoints,
    save_client_keys,
)

ANYWHERE = dict.fromkeys((Right.OBSERVE, Right.OPERATE), "tcp://127.0.0.1:*")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    make_server_keys(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, keys: Path) -> Iterator[Hub]:
    remote = remote_endpoints(keys, ANYWHERE, "tcp://127.0.0.1:*")
    hub = Hub("hub", ipc_endpoints(secure_directory(tmp_path / "bus")), remote=remote)
    hub.attach("echo", Echo())
    yield hub
    hub.close()


def remote_leaf(hub: Hub, keys: ClientKeys, right: Right, name: str = "client-far") -> Leaf:
    assert hub.remote is not None
    return Leaf(name, hub.remote.rights[right], keys=keys)


def test_a_client_elsewhere_and_one_here_talk_to_one_hub(hub: Hub, keys: Path) -> None:
    far = remote_leaf(hub, make_client_keys(keys, "far", Right.OPERATE), Right.OPERATE)
    near = Leaf("client-near", hub.addresses[Right.OPERATE])
    try:
        for leaf in (far, near):
            assert leaf.wait_up(5), leaf.refused
            assert leaf.ask("hub/echo", Change(text="x"), timeout=5).result() == Answer(text="x")
        assert hub.nodes == ["client-far", "client-near"]
    finally:
        far.close()
        near.close()


def test_a_client_elsewhere_gets_topics_where_the_hub_says_they_are(hub: Hub, keys: Path) -> None:
    far = remote_leaf(hub, make_client_keys(keys, "far", Right.OBSERVE), Right.OBSERVE)
    got = Signal()
    try:
        assert far.wait_up(5), far.refused
        assert far.subscribe("news", got).wait_ready(5)
        hub.publish("news", Look(text="one"))
        assert got.wait(lambda seen: len(seen) == 1)[0].message == Look(text="one")
    finally:
        far.close()


def test_an_observers_key_opens_no_operators_endpoint(hub: Hub, keys: Path) -> None:
    made = make_client_keys(keys, "far", Right.OBSERVE)
    wrong, right = remote_leaf(hub, made, Right.OPERATE), remote_leaf(hub, made, Right.OBSERVE)
    try:
        assert right.wait_up(5)
        outcome = right.ask("hub/echo", Change(), timeout=5).wait()
        assert isinstance(outcome, Fault)
        assert outcome.reason is FaultReason.REFUSED
        assert not wrong.wait_up(0.3)
    finally:
        wrong.close()
        right.close()


def test_a_key_that_is_removed_opens_no_new_link(hub: Hub, keys: Path) -> None:
    made = make_client_keys(keys, "far", Right.OPERATE)
    first = remote_leaf(hub, made, Right.OPERATE)
    assert first.wait_up(5)
    first.close()
    for folder in ("observe", "operate"):
        (keys / "clients" / folder / "far.key").unlink()
    again = remote_leaf(hub, made, Right.OPERATE)
    other = remote_leaf(
        hub, make_client_keys(keys, "new", Right.OPERATE), Right.OPERATE, "client-n"
    )
    try:
        assert other.wait_up(5)
        assert not again.wait_up(0.3)
    finally:
        again.close()
        other.close()


def test_the_endpoints_of_this_host_ask_for_no_keys_and_those_for_others_do(hub: Hub) -> None:
    assert hub.remote is not None
    with zmq.Context() as context, context.socket(zmq.DEALER) as bare:
        bare.linger = 0
        # Before it connects: of a handshake that has failed there is one event, and no second try.
        monitor = bare.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        try:
            bare.connect(hub.remote.rights[Right.OPERATE])
            assert monitor.poll(5000)
            event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
            assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
        finally:
            bare.disable_monitor()
            monitor.close(linger=0)
    near = Leaf("client-near", hub.addresses[Right.OBSERVE])
    assert near.wait_up(5)
    near.close()


def test_without_keys_nothing_listens(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="no CURVE keys"):
        remote_endpoints(tmp_path / "none", ANYWHERE, "")


def test_a_clients_file_is_its_owners_only_and_is_never_overwritten(
    tmp_path: Path, keys: Path
) -> None:
    made = make_client_keys(keys, "far", Right.OBSERVE)
    assert made.server == make_server_keys(keys)
    path = tmp_path / "far.keys"
    save_client_keys(path, made)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_client_keys(path) == made
    with pytest.raises(AccessError, match="there already"):
        save_client_keys(path, made)
    with pytest.raises(AccessError, match="there already"):
        make_client_keys(keys, "far", Right.OBSERVE)
    path.chmod(0o640)
    with pytest.raises(AccessError, match="chmod 600"):
        load_client_keys(path)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"public": "a", "secret": 1}', "\0" * 9000])
def test_a_file_that_holds_no_keys_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.keys"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(AccessError, match="voidbus keys client"):
        load_client_keys(path)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_a_clients_name_is_a_files(keys: Path, name: str) -> None:
    with pytest.raises(AccessError, match="for its name"):
        make_client_keys(keys, name, Right.OBSERVE)
