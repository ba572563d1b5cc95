"""Requests made from the API's own description, by schemathesis, against a live supervisor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from api_kit import ApiHouse, agent, step, structured, workflow
from http_kit import HttpClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from voidbus.gateway.openapi import describe
from voidbus.gateway.routes import ROUTES

EXAMPLES = 25
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# These are for a run that goes on; all others are asked of runs that have ended, so that no stream
# goes on without an end.
_OF_A_LIVE_RUN = ("/inbox", "/intents", "/messages")

DOCUMENT = schemathesis.openapi.from_dict(describe(ROUTES, "0"))
OPERATIONS = {
    each.ok().label: each.ok() for each in DOCUMENT.get_all_operations() if isinstance(each, Ok)
}
# Where there is nothing but a path, there is nothing that could be wrong.
CASES = [
    (label, mode)
    for label, operation in OPERATIONS.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or list(operation.query) or list(operation.body)
]


@dataclass(frozen=True)
class Known:
    """Names that are there, by parameter: what is made up alone is never found."""

    ended: dict[str, list[str]]
    live: dict[str, list[str]]


@pytest.fixture(scope="module")
def known(house: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    folder = tmp_path_factory.mktemp("fuzz")
    result = {"status": "ok", "artifacts": [{"name": "note"}]}
    made = step("made", structured(result, ("note", "x")))
    good = house.unix.finish(workflow(folder, made, output_step="made"))["id"]
    bad = house.unix.finish(folder / "nothing.yaml")["id"]
    live = house.unix.start(agent(folder, CLAUDIO_HANG="1"))
    house.unix.wait_type(live, "stage.started")
    yield Known(
        {"run_id": [good, bad], "stage": ["made", "main"], "name": ["note"], "session_id": ["s"]},
        {"run_id": [live]},
    )
    house.unix.post(f"/v1/runs/{live}/cancel", {"grace_secs": 0})


@pytest.fixture(scope="module")
def session(house: ApiHouse) -> Iterator[requests.Session]:
    with requests.Session() as opened:
        opened.headers.update(house.tcp.auth)
        yield opened


def url(client: HttpClient) -> str:
    assert isinstance(client.where, tuple)
    return f"http://{client.where[0]}:{client.where[1]}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("label", "mode"), CASES)
def test_whatever_is_asked_is_answered_as_the_document_says(
    house: ApiHouse, known: Known, session: requests.Session, label: str, mode: GenerationMode
) -> None:
    operation = OPERATIONS[label]
    names = known.live if label.endswith(_OF_A_LIVE_RUN) else known.ended

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def ask(case: schemathesis.Case[Any], data: st.DataObject) -> None:
        for parameter in case.path_parameters or {}:
            if parameter in names and data.draw(st.booleans()):
                case.path_parameters[parameter] = data.draw(st.sampled_from(names[parameter]))
        response = case.call(base_url=url(house.tcp), session=session, timeout=30)
        case.validate_response(response, checks=CHECKS)

    ask()
