"""The session: what each message leads to, without any I/O."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_kit import ENVELOPE, INBOX, STATELESS, VERSIONS, call, message

from voidbus.mcp.jsonrpc import Invalid, Notification, Request, decode, encode
from voidbus.mcp.server import LEVELS, MAX_RUNNING, Send, Session, Stop, Work
from voidbus.mcp.tools import TOOLS, Ask
from voidbus.sidecar.client import Reply, SidecarClientError

HEADER = Reply(200, b'{"version":3}')
INTENT = Reply(201, b'{"intent_id":"int-1"}')


def session(version: str | None = None) -> Session:
    made = Session(lambda: "key")
    if version is not None:
        answer(made, message("initialize", 0, protocolVersion=version))
    return made


def effects(one: Session, body: Any) -> list[Any]:
    (incoming,) = decode(json.dumps(body).encode()).messages
    return list(one.receive(incoming))


def answer(one: Session, body: Any) -> dict[str, Any]:
    """The answer to a message that needs no sidecar."""
    (effect,) = effects(one, body)
    assert isinstance(effect, Send)
    return effect.body


def work(one: Session, body: Any) -> Work:
    (effect,) = effects(one, body)
    assert isinstance(effect, Work)
    return effect


def through(one: Session, body: Any, reply: Reply | SidecarClientError) -> dict[str, Any]:
    """The answer to a message, its work done with this reply."""
    (told,) = one.finish(work(one, body), reply)
    return told


# Messages


@given(st.binary(max_size=400) | st.text().map(str.encode))
def test_whatever_bytes_arrive_become_messages_and_answers(data: bytes) -> None:
    one = session()
    for incoming in decode(data).messages:
        for effect in one.receive(incoming):
            if isinstance(effect, Send):
                assert json.loads(encode(effect.body))["jsonrpc"] == "2.0"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
_methods = st.sampled_from(
    ["initialize", "ping", "tools/list", "tools/call", "resources/read", "resources/subscribe",
     "logging/setLevel", "server/discover", "subscriptions/listen", "notifications/cancelled"]
)  # fmt: skip
_params = st.dictionaries(
    st.sampled_from(["name", "arguments", "uri", "level", "requestId", "_meta", "notifications"]),
    _json | st.sampled_from([*TOOLS, INBOX]) | st.just(ENVELOPE),
)


@given(st.lists(st.tuples(_methods | st.text(max_size=5), _json | st.integers(0, 3), _params)))
def test_whatever_is_asked_is_answered_and_the_session_goes_on(
    asked: list[tuple[str, Any, Any]],
) -> None:
    one = session()
    for method, request_id, params in asked:
        body = json.dumps({"method": method, "id": request_id, "params": params}).encode()
        for incoming in decode(body).messages:
            for effect in one.receive(incoming):
                if isinstance(effect, Send):
                    encode(effect.body)
                elif isinstance(effect, Work):
                    assert [encode(told) for told in one.finish(effect, HEADER)]
    assert "result" in answer(one, message("ping", "at the end"))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"{", -32700),
        (b"", -32700),
        (b"\xff", -32700),
        (b'{"id":1,"method":"ping","params":NaN}', -32700),
        (b"[" * 50000, -32700),
        (b"1" * 5000, -32700),
        (b"[]", -32600),
        (b"[1]", -32600),
        (b'"ping"', -32600),
        (b'{"id":1}', -32600),
        (b'{"id":1,"method":2}', -32600),
        (b'{"id":1,"method":"ping","params":[]}', -32600),
        (b'{"id":true,"method":"ping"}', -32600),
        (b'{"id":1.5,"method":"ping"}', -32600),
        (b'{"id":{},"method":"ping"}', -32600),
        (b" " * 300_000, -32600),
    ],
)
def test_what_is_no_message_is_an_error(data: bytes, code: int) -> None:
    (wrong,) = decode(data).messages
    assert isinstance(wrong, Invalid)
    assert wrong.answer["error"]["code"] == code


def test_an_error_to_nobody_has_no_id() -> None:
    (wrong,) = decode(b"{").messages
    assert isinstance(wrong, Invalid)
    assert "id" not in wrong.answer


def test_no_id_and_a_null_id_are_notifications() -> None:
    for text in (b'{"method":"ping"}', b'{"jsonrpc":"2.0","id":null,"method":"ping"}'):
        (incoming,) = decode(text).messages
        assert incoming == Notification("ping")
        assert session().receive(incoming) == []


def test_arrays_of_messages_and_a_byte_order_mark_are_read() -> None:
    body = decode(b'\xef\xbb\xbf[{"id":1,"method":"a"},{"method":"b"},{"id":9,"result":{}}]')
    assert body.is_batch
    assert body.messages == (Request(1, "a"), Notification("b"), Notification(""))


# Versions


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_we_speak_is_agreed_to(version: str) -> None:
    result = answer(session(), message("initialize", 1, protocolVersion=version))["result"]
    assert result["protocolVersion"] == version
    assert result["serverInfo"]["name"] == "void-mcp"
    assert set(result["capabilities"]) == {"tools", "resources", "logging"}
    assert "void://inbox" in result["instructions"]


@pytest.mark.parametrize("version", ["1999-01-01", None, 7, STATELESS])
def test_any_other_is_answered_with_the_newest_of_those_with_a_handshake(version: Any) -> None:
    result = answer(session(), message("initialize", 1, protocolVersion=version))["result"]
    assert result["protocolVersion"] == "2025-11-25"


@pytest.mark.parametrize("version", VERSIONS)
def test_structure_is_told_of_only_to_clients_who_know_it(version: str) -> None:
    one = session(version)
    knows = version >= "2025-06-18"
    for tool in answer(one, message("tools/list", 1))["result"]["tools"]:
        assert ("outputSchema" in tool, "title" in tool) == (knows, knows)
        assert tool["annotations"]["destructiveHint"] is False
    result = through(one, call("broadcast_observation", summary_text="x"), INTENT)["result"]
    assert ("structuredContent" in result) == knows
    assert "isError" not in result


def test_a_client_that_never_initializes_is_served() -> None:
    assert len(answer(session(), message("tools/list", 1))["result"]["tools"]) == 4


def test_since_2026_a_request_carries_its_version_and_results_are_stamped() -> None:
    one = session()
    found = answer(one, message("server/discover", 1, _meta=ENVELOPE))["result"]
    assert found["supportedVersions"] == [*VERSIONS, STATELESS]
    listed = answer(one, message("tools/list", 2, _meta=ENVELOPE))["result"]
    read = through(one, message("resources/read", 3, uri=INBOX, _meta=ENVELOPE), HEADER)["result"]
    called = through(one, {**call("read_peer_messages", 4)} | {}, HEADER)["result"]
    assert "resultType" not in called
    for result, keeps in ((found, True), (listed, True), (read, False)):
        assert result["resultType"] == "complete"
        assert result["_meta"]["io.modelcontextprotocol/serverInfo"]["name"] == "void-mcp"
        assert (result["ttlMs"] > 0) == keeps


@pytest.mark.parametrize(
    "method", ["initialize", "ping", "logging/setLevel", "resources/subscribe"]
)
def test_what_2026_took_away_is_not_found_there(method: str) -> None:
    told = answer(session(), message(method, 1, _meta=ENVELOPE))
    assert told["error"]["code"] == -32601


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"io.modelcontextprotocol/protocolVersion": "2027-01-01"}, -32022),
        ({"io.modelcontextprotocol/protocolVersion": "2025-06-18"}, -32022),
        ({"io.modelcontextprotocol/protocolVersion": 7}, -32602),
        ({"io.modelcontextprotocol/clientCapabilities": None}, -32602),
    ],
)
def test_a_wrong_envelope_is_refused(change: dict[str, Any], code: int) -> None:
    told = answer(session(), message("tools/list", 1, _meta={**ENVELOPE, **change}))
    assert told["error"]["code"] == code
    if code == -32022:
        assert STATELESS in told["error"]["data"]["supported"]


# Tools


def asked(name: str, **arguments: Any) -> Ask:
    return work(session(), call(name, 1, **arguments)).ask


def intent(name: str, **arguments: Any) -> dict[str, Any]:
    ask = asked(name, **arguments)
    assert (ask.method, ask.path, ask.headers) == (
        "POST",
        "/v1/intents",
        {"Idempotency-Key": "key"},
    )
    assert ask.body is not None
    return dict(json.loads(ask.body))


def test_reading_asks_for_the_context_and_the_inbox() -> None:
    assert asked("read_shared_context") == Ask("GET", "/v1/context")
    assert asked("read_peer_messages") == Ask("GET", "/v1/inbox")
    assert asked("read_peer_messages", since=None) == Ask("GET", "/v1/inbox")
    assert asked("read_peer_messages", since=7) == Ask("GET", "/v1/inbox?since=7")
    assert asked("read_peer_messages", since=7.0) == Ask("GET", "/v1/inbox?since=7")


def test_an_observation_is_a_signal_to_all() -> None:
    assert intent("broadcast_observation", summary_text="grüße", priority="high") == {
        "kind": "signal",
        "audience": "broadcast",
        "payload": {"summary_text": "grüße"},
        "priority": "high",
    }


@pytest.mark.parametrize(
    ("disposition", "kind"),
    [
        (None, "proposal"),
        ("promote", "proposal"),
        ("refine", "evaluation"),
        ("reject", "evaluation"),
    ],
)
def test_a_recommendation_is_a_proposal_or_an_evaluation_for_the_leader(
    disposition: str | None, kind: str
) -> None:
    extra = {} if disposition is None else {"disposition": disposition}
    assert intent("recommend_to_leader", summary_text="s", **extra) == {
        "kind": kind,
        "audience": "leader",
        "payload": {"summary_text": "s", **extra},
        "priority": "normal",
    }


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("read_peer_messages", {"since": -1}, "since must be a version"),
        ("read_peer_messages", {"since": "1"}, "since must be a version"),
        ("read_peer_messages", {"since": True}, "since must be a version"),
        ("read_peer_messages", {"since": 2**64}, "since must be a version"),
        ("broadcast_observation", {}, "needs 'summary_text'"),
        ("broadcast_observation", {"summary_text": " "}, "not empty"),
        ("broadcast_observation", {"summary_text": 7}, "not empty"),
        ("broadcast_observation", {"summary_text": "x", "priority": "urgent"}, "high, normal, low"),
        ("recommend_to_leader", {"summary_text": "x", "disposition": []}, "promote, refine"),
    ],
)
def test_wrong_arguments_are_a_result_the_model_can_read(
    name: str, arguments: dict[str, Any], says: str
) -> None:
    result = answer(session(), call(name, 1, **arguments))["result"]
    assert result["isError"] is True
    assert result["content"][0]["text"].startswith("Error: ")
    assert says in result["content"][0]["text"]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (SidecarClientError("can't connect"), "Error: can't connect"),
        (Reply(429, b'{"code":"TOO_MANY_REQUESTS","message":"later"}'),
         "Error: later (TOO_MANY_REQUESTS, HTTP 429)"),
        (Reply(500, b"oops"), "Error: HTTP 500: oops"),
        (Reply(500, b"[]"), "Error: HTTP 500: []"),
        (Reply(200, b"[" * 5000), "Error: the sidecar's answer is no JSON"),
        (Reply(200, b"[]"), "Error: the sidecar's answer is no object"),
    ],
)  # fmt: skip
def test_a_sidecar_that_refuses_or_fails_is_a_result_with_is_error(
    reply: Reply | SidecarClientError, says: str
) -> None:
    told = through(session("2025-11-25"), call("read_shared_context"), reply)
    assert told["result"] == {"content": [{"type": "text", "text": says}], "isError": True}


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "Missing tool name"),
        ({"name": 7}, "Missing tool name"),
        ({"name": "dance"}, "Unknown tool: dance"),
        ({"name": "read_shared_context", "arguments": []}, "arguments are an object"),
    ],
)
def test_a_call_that_is_no_call_is_a_protocol_error(params: dict[str, Any], says: str) -> None:
    told = answer(session(), message("tools/call", 1, **params))["error"]
    assert told["code"] == -32602
    assert says in told["message"]


@pytest.mark.parametrize("name", TOOLS)
def test_every_schema_and_description_says_what_a_model_needs(name: str) -> None:
    tool = TOOLS[name].shown(structured=True)
    schema = tool["inputSchema"]
    assert schema["type"] == "object"
    assert set(schema.get("required", ())) <= set(schema["properties"])
    assert all(each["description"] for each in schema["properties"].values())
    assert len(tool["description"]) > 150
    assert tool["annotations"]["readOnlyHint"] == name.startswith("read_")


# Requests under way


def test_a_cancelled_request_is_stopped_and_not_answered() -> None:
    one = session()
    begun = work(one, call("read_shared_context", "a"))
    assert effects(one, message("notifications/cancelled", requestId="a")) == [Stop("a")]
    one.forget(begun)
    assert effects(one, message("notifications/cancelled", requestId="a")) == []
    assert work(one, call("read_shared_context", "a"))


@pytest.mark.parametrize("request_id", [2, "1", None, [], True])
def test_cancelling_what_is_not_under_way_does_nothing(request_id: Any) -> None:
    one = session()
    work(one, call("read_shared_context", 1))
    assert effects(one, message("notifications/cancelled", requestId=request_id)) == []


def test_an_id_that_is_under_way_and_one_request_too_many_are_refused() -> None:
    one = session()
    for number in range(MAX_RUNNING):
        work(one, call("read_shared_context", number))
    assert answer(one, call("read_shared_context", 0))["error"]["code"] == -32600
    told = answer(one, call("read_shared_context", "more"))["error"]
    assert (told["code"], "the limit" in told["message"]) == (-32000, True)
    assert answer(one, message("ping", "p"))["result"] == {}


# The inbox


def test_the_inbox_is_the_one_resource() -> None:
    one = session("2025-11-25")
    (row,) = answer(one, message("resources/list", 1))["result"]["resources"]
    assert (row["uri"], row["mimeType"]) == (INBOX, "application/json")
    assert answer(one, message("resources/templates/list", 1))["result"] == {
        "resourceTemplates": []
    }
    read = through(one, message("resources/read", 2, uri=INBOX), HEADER)["result"]
    assert read["contents"] == [
        {"uri": INBOX, "mimeType": "application/json", "text": '{"version":3}'}
    ]


@pytest.mark.parametrize("method", ["resources/read", "resources/subscribe"])
def test_a_resource_that_is_not_there_and_a_sidecar_that_fails_are_errors(method: str) -> None:
    one = session()
    assert answer(one, message(method, 1, uri="void://x"))["error"]["code"] == -32002
    assert answer(one, message(method, 1))["error"]["code"] == -32602
    for reply in (SidecarClientError("gone"), Reply(500, b"x")):
        assert through(one, message(method, 1, uri=INBOX), reply)["error"]["code"] == -32603
    assert not one.is_watching


def test_who_subscribes_is_told_of_changes_until_it_unsubscribes() -> None:
    one = session()
    assert one.inbox_changed() == []
    assert through(one, message("resources/subscribe", 1, uri=INBOX), HEADER)["result"] == {}
    assert one.inbox_changed() == [
        {
            "jsonrpc": "2.0",
            "method": "notifications/resources/updated",
            "params": {"uri": INBOX},
        }
    ]
    answer(one, message("resources/unsubscribe", 2, uri=INBOX))
    assert (one.inbox_changed(), one.is_watching) == ([], False)


def test_who_listens_is_told_with_the_id_it_listens_by_and_answered_at_the_end() -> None:
    one = session()
    wanted = {"resourceSubscriptions": [INBOX, "x"], "toolsListChanged": True}
    listen = message("subscriptions/listen", "l1", notifications=wanted, _meta=ENVELOPE)
    acknowledged = through(one, listen, HEADER)
    assert acknowledged["method"] == "notifications/subscriptions/acknowledged"
    assert acknowledged["params"]["notifications"] == {"resourceSubscriptions": [INBOX]}
    (told,) = one.inbox_changed()
    tag = {"io.modelcontextprotocol/subscriptionId": "l1"}
    assert told["params"] == {"uri": INBOX, "_meta": tag}
    (ended,) = one.end()
    assert ended["id"] == "l1"
    assert ended["result"]["_meta"].items() >= tag.items()
    assert one.end() == []


def test_who_cancels_listening_is_told_no_more() -> None:
    one = session()
    wanted = {"resourceSubscriptions": [INBOX]}
    listen = message("subscriptions/listen", "l1", notifications=wanted, _meta=ENVELOPE)
    through(one, listen, HEADER)
    effects(one, message("notifications/cancelled", requestId="l1"))
    assert (one.inbox_changed(), one.end(), one.is_watching) == ([], [], False)


def test_log_messages_are_sent_from_the_level_that_was_set() -> None:
    one = session()
    assert one.log("info", "x")[0]["params"] == {"level": "info", "logger": "void-mcp", "data": "x"}
    assert answer(one, message("logging/setLevel", 1, level="error"))["result"] == {}
    assert one.log("warning", "x") == []
    assert one.log("error", "x")
    told = answer(one, message("logging/setLevel", 1, level="loud"))
    assert told["error"]["code"] == -32602
    assert all(level in told["error"]["message"] for level in LEVELS)
