"""The official Python SDK's client, from its own environment, against void-mcp."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from mcp_kit import INBOX, PROGRAM, STATELESS, VERSIONS, http_mcp, stuck_sidecar
from mcp_sdk import SDK_VERSIONS, Sdk, SdkClient, sdk
from sidecar_kit import RunningSidecar, entry

# The first of these tests makes the SDK's environment.
pytestmark = [pytest.mark.needs("mcp-sdk"), pytest.mark.timeout(400)]

Connect = Callable[[str, str], AbstractContextManager[SdkClient]]
TOOLS = [
    *("read_shared_context", "read_peer_messages"),
    *("broadcast_observation", "recommend_to_leader"),
]


NEWEST, FIRST = SDK_VERSIONS


@pytest.fixture(scope="module", params=[NEWEST])
def process(request: pytest.FixtureRequest) -> Iterator[Sdk]:
    with sdk(request.param) as process:
        yield process


both_generations = pytest.mark.parametrize("process", SDK_VERSIONS, indirect=True)


@pytest.fixture(params=["stdio", "http"])
def connect(request: pytest.FixtureRequest, process: Sdk) -> Connect:
    """Connects the SDK's client to a void-mcp whose sidecar is at this URL, by this version."""

    @contextmanager
    def on_stdio(url: str, version: str) -> Iterator[SdkClient]:
        environment = {"VOID_SIDECAR_URL": url}
        with process.client(version, command=PROGRAM, env=environment) as client:
            yield client

    @contextmanager
    def on_http(url: str, version: str) -> Iterator[SdkClient]:
        with http_mcp(url) as server, process.client(version, url=server.url) as client:
            yield client

    return on_stdio if request.param == "stdio" else on_http


_each = [(NEWEST, version) for version in (*VERSIONS, STATELESS)]
_each += [(FIRST, version) for version in VERSIONS]


@pytest.mark.parametrize(("process", "version"), _each, indirect=["process"])
def test_each_version_is_agreed_on_and_every_tool_and_resource_works(
    connect: Connect, version: str, sidecar: RunningSidecar
) -> None:
    with connect(sidecar.url, version) as client:
        assert client.info["version"] == version
        if version != STATELESS:
            assert client.info["name"] == "void-mcp"
            assert set(client.info["capabilities"]) == {"tools", "resources", "logging"}
            assert client.do("ping") is not None
            assert client.do("level", level="debug") is not None
        assert [tool["name"] for tool in client.do("list_tools")["tools"]] == TOOLS
        context = client.do("call", name="read_shared_context", arguments={})
        assert json.loads(context["content"][0]["text"])["role"] == "candidate"
        assert ("structuredContent" in context) == (version >= "2025-06-18")
        messages = client.do("call", name="read_peer_messages", arguments={"since": 2})
        assert "a" in messages["content"][0]["text"]
        for name, text in (("broadcast_observation", "o"), ("recommend_to_leader", "r")):
            sent = client.do("call", name=name, arguments={"summary_text": text})
            assert not sent.get("isError")
        assert [one.payload for one in sidecar.server.drain()] == [
            {"summary_text": "o"},
            {"summary_text": "r"},
        ]
        (row,) = client.do("list_resources")["resources"]
        assert row["uri"] == INBOX
        assert client.do("list_templates")["resourceTemplates"] == []
        (content,) = client.do("read", uri=INBOX)["contents"]
        assert json.loads(content["text"])["version"] == 3


@pytest.mark.parametrize(
    ("process", "version"),
    [(NEWEST, "2025-11-25"), (NEWEST, STATELESS), (FIRST, "2025-11-25")],
    indirect=["process"],
)
def test_errors_of_tools_are_results_and_others_are_the_protocols(
    connect: Connect, version: str, sidecar: RunningSidecar
) -> None:
    with connect(sidecar.url, version) as client:
        wrong = client.do("call", name="broadcast_observation", arguments={})
        assert wrong["isError"] is True
        assert "needs 'summary_text'" in wrong["content"][0]["text"]
        unknown = client.fails("call", name="dance", arguments={})
        assert unknown == {"code": -32602, "message": "Unknown tool: dance"}
        missing = client.fails("read", uri="void://nothing")
        assert missing["code"] == (-32602 if version == STATELESS else -32002)
        sidecar.server.stop(10)
        gone = client.do("call", name="read_shared_context", arguments={})
        assert gone["isError"] is True


@both_generations
def test_a_subscriber_is_told_of_what_arrives(connect: Connect, sidecar: RunningSidecar) -> None:
    with connect(sidecar.url, "2025-11-25") as client:
        assert client.do("subscribe", uri=INBOX) is not None
        sidecar.server.push_message(entry("m"))
        told = client.do("next_told")
        assert (told["method"], told["params"]["uri"]) == ("notifications/resources/updated", INBOX)
        (content,) = client.do("read", uri=INBOX)["contents"]
        assert len(json.loads(content["text"])["entries"]) == 2
        assert client.do("unsubscribe", uri=INBOX) is not None


def test_since_2026_who_listens_is_told_of_what_arrives(
    connect: Connect, sidecar: RunningSidecar
) -> None:
    with connect(sidecar.url, STATELESS) as client:
        assert client.do("listen", uri=INBOX) == {"resourceSubscriptions": [INBOX]}
        sidecar.server.push_message(entry("m"))
        assert client.do("next_event") == {"type": "ResourceUpdated", "uri": INBOX}
        sidecar.server.push_message(entry("n"))
        assert client.do("next_event") == {"type": "ResourceUpdated", "uri": INBOX}


@pytest.mark.parametrize("version", ["2025-11-25", STATELESS])
def test_a_call_that_is_cancelled_leaves_the_sidecar_and_others_are_served(
    connect: Connect, version: str
) -> None:
    with stuck_sidecar() as stuck, connect(stuck.url, version) as client:
        client.do("begin", label="slow", name="read_shared_context", arguments={})
        assert stuck.asked.wait(20)
        assert client.do("list_tools")["tools"]
        assert client.do("cancel", label="slow") == {"cancelled": True}
        assert stuck.left.wait(5)
        assert client.do("list_tools")["tools"]


def test_a_client_that_finds_out_by_itself_takes_the_newest(
    connect: Connect, sidecar: RunningSidecar
) -> None:
    with connect(sidecar.url, "auto") as client:
        assert client.info["version"] == STATELESS
        assert client.info["name"] == "void-mcp"
        assert client.do("list_tools")["tools"]
