"""A client that takes its time over tens of megabytes delays nobody."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from api_kit import ApiHouse, step, structured, workflow
from guest_vm import eventually
from http_kit import HttpClient

# Of lines as long as they are kept whole, as many as come to tens of megabytes.
_LINE = 8000
_LINES = 2500
_SIZE = _LINE * _LINES


@pytest.fixture(scope="module")
def large(house: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that printed 20 MB and left a file as large; without its events."""
    result = {"status": "ok", "artifacts": [{"name": "big"}]}
    script = f"{structured(result)}; yes {'x' * (_LINE - 1)} | head -{_LINES} | tee big"
    spec = workflow(tmp_path_factory.mktemp("large"), step("a", script), output_step="a")
    run = house.unix.wait_end(house.unix.start(spec), 60)
    assert run["status"] == "succeeded"
    return {name: value for name, value in run.items() if name != "events"}


@contextmanager
def begun(client: HttpClient, path: str) -> Iterator[http.client.HTTPResponse]:
    """An answer of which the head was read, and nothing else yet."""
    with client.connect() as sock:
        sock.sendall(client.head_bytes(f"GET {path} HTTP/1.1"))
        with http.client.HTTPResponse(sock) as response:
            response.begin()
            yield response


def served(api: HttpClient, route: str) -> int:
    """How many requests of this route have been answered to their end."""
    start = f'voidbus_http_requests_total{{route="{route}",status="200"}} '
    lines = api.get("/metrics").text.splitlines()
    return next((int(float(line.removeprefix(start))) for line in lines if start in line), 0)


@pytest.mark.parametrize(
    ("route", "path"),
    [
        ("/v1/runs", "/v1/runs"),
        ("/v1/runs/{run_id}", "/v1/runs/{run_id}"),
        ("/v1/runs/{run_id}/events", "/v1/runs/{run_id}/events"),
        (
            "/v1/runs/{run_id}/stages/{stage:path}/artifacts/{name}",
            "/v1/runs/{run_id}/stages/a/artifacts/big",
        ),
    ],
)
def test_others_are_answered_while_a_client_is_in_the_middle_of_tens_of_megabytes(
    unix: HttpClient,
    tcp: HttpClient,
    large: dict[str, Any],
    ended: dict[str, Any],
    route: str,
    path: str,
) -> None:
    with begun(unix, path.format(run_id=large["id"])) as slow:
        length = int(slow.headers["content-length"])
        assert length >= _SIZE
        before = served(unix, route)
        for client in (unix, tcp):
            assert client.get("/v1/health").json["status"] == "ok"
            assert client.run(ended["id"]) == ended
        # Of inspecting, only what was asked for here has been answered to its end.
        others = 2 if route == "/v1/runs/{run_id}" else 0
        assert served(unix, route) == before + others
        content = slow.read()
        assert len(content) == length
        assert eventually(lambda: served(unix, route) == before + others + 1, 20)
    if not path.endswith("big"):
        json.loads(content)
