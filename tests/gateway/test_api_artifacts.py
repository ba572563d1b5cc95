"""What runs leave: output files, named artifacts, the manifest (contract 1.9, section 9)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import ApiHouse, agent, api_house, box, gate, pipeline, step, structured, workflow
from http_kit import HttpClient

NOTE = "the note"
TABLE = '{"a": 1}'
RESULT = {
    "status": "ok",
    "metrics": {"score": 1},
    "artifacts": [
        {"name": "note.txt", "media_type": "text/markdown"},
        {"name": "table", "path": "deep/table.json"},
        {"name": "bytes.bin"},
        *({"name": name} for name in ("words", "number", "spaced", "nan")),
        {"name": "gone.txt"},
        {"name": ""},
        {"media_type": "text/plain"},
        7,
    ],
}
SCRIPT = (
    f"mkdir -p deep; printf '%s' '{TABLE}' > deep/table.json\n"
    """printf '"abc"' > words; printf 42 > number; printf ' {"a":1}' > spaced\n"""
    """printf '{"a":NaN}' > nan\n"""
    "printf '\\377\\376' > bytes.bin\n" + structured(RESULT, ("note.txt", NOTE))
)


@pytest.fixture(scope="module")
def published(house: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spec = workflow(tmp_path_factory.mktemp("published"), step("make", SCRIPT), output_step="make")
    return house.unix.finish(spec)


def test_the_manifest_lists_the_output_and_the_files_it_names(published: dict[str, Any]) -> None:
    assert published["status"] == "succeeded"
    publication = published["artifact_publication"]
    assert set(publication) == {"status", "published_at", "manifest"}
    assert publication["status"] == "published"
    at = f"/v1/runs/{published['id']}/stages/make"
    result, note, table, binary, *_, gone = publication["manifest"]
    for entry, name, media_type, path in (
        (result, "result.json", "application/json", f"{at}/output-file"),
        (note, "note.txt", "text/markdown", f"{at}/artifacts/note.txt"),
        (table, "table", "application/octet-stream", f"{at}/artifacts/table"),
        (binary, "bytes.bin", "application/octet-stream", f"{at}/artifacts/bytes.bin"),
        (gone, "gone.txt", "application/octet-stream", f"{at}/artifacts/gone.txt"),
    ):
        found = (entry["name"], entry["stage"], entry["media_type"], entry["retrieval_path"])
        assert found == (name, "make", media_type, path)
    assert note["size_bytes"] == len(NOTE)
    assert note["digest"] == f"sha256:{hashlib.sha256(NOTE.encode()).hexdigest()}"
    # What was named and not kept has no size.
    assert set(gone) == {"name", "stage", "media_type", "retrieval_path"}


def test_everything_the_manifest_lists_with_a_size_is_there(
    api: HttpClient, published: dict[str, Any]
) -> None:
    for entry in published["artifact_publication"]["manifest"]:
        answer = api.get(entry["retrieval_path"])
        if "size_bytes" not in entry:
            assert answer.problem == (404, "ARTIFACT_NOT_FOUND", False)
            continue
        assert answer.status == 200
        assert len(answer.body) == entry["size_bytes"]
        assert f"sha256:{hashlib.sha256(answer.body).hexdigest()}" == entry["digest"]


def test_an_output_file_is_sent_as_it_is(api: HttpClient, published: dict[str, Any]) -> None:
    answer = api.get(f"/v1/runs/{published['id']}/stages/make/output-file")
    assert answer.headers["content-type"] == "application/json"
    assert answer.body == json.dumps(RESULT).encode() + b"\n"


def test_a_workflows_output_is_found_under_main_too(
    api: HttpClient, published: dict[str, Any]
) -> None:
    for path in ("output-file", "artifacts/note.txt", "artifacts/table"):
        of_step = api.get(f"/v1/runs/{published['id']}/stages/make/{path}")
        of_main = api.get(f"/v1/runs/{published['id']}/stages/main/{path}")
        assert (of_main.status, of_main.body) == (200, of_step.body)


@pytest.mark.parametrize(
    ("name", "content", "media_type"),
    [
        ("note.txt", NOTE.encode(), "text/plain"),
        ("table", TABLE.encode(), "application/json"),
        ("words", b'"abc"', "application/json"),
        ("number", b"42", "application/json"),
        ("spaced", b' {"a":1}', "application/json"),
        ("nan", b'{"a":NaN}', "text/plain"),
        ("bytes.bin", b"\xff\xfe", "application/octet-stream"),
    ],
)
def test_the_type_of_a_named_artifact_is_told_by_its_content(
    api: HttpClient, published: dict[str, Any], name: str, content: bytes, media_type: str
) -> None:
    answer = api.get(f"/v1/runs/{published['id']}/stages/make/artifacts/{name}")
    assert (answer.status, answer.body) == (200, content)
    assert answer.headers["content-type"].partition(";")[0] == media_type


def test_what_is_not_there_is_told_apart_from_a_run_that_is_not_there(
    api: HttpClient, published: dict[str, Any]
) -> None:
    run = f"/v1/runs/{published['id']}"
    for path, problem in (
        (f"{run}/stages/other/output-file", "STRUCTURED_OUTPUT_MISSING"),
        (f"{run}/stages/make/artifacts/other", "ARTIFACT_NOT_FOUND"),
        (f"{run}/stages/other/artifacts/note.txt", "ARTIFACT_NOT_FOUND"),
        ("/v1/runs/nobody/stages/make/output-file", "NOT_FOUND"),
        ("/v1/runs/nobody/stages/make/artifacts/note.txt", "NOT_FOUND"),
    ):
        assert api.get(path).problem == (404, problem, False), path


@pytest.mark.parametrize("name", ["..", "a..b", "..%2Fx", "a%2Fb", "a%5Cb", "%00", "%20"])
def test_a_name_that_could_be_a_path_is_refused(
    door: HttpClient, published: dict[str, Any], name: str
) -> None:
    answer = door.get(f"/v1/runs/{published['id']}/stages/make/artifacts/{name}")
    assert answer.problem == (400, "INVALID_PARAMS", False)


def test_stage_and_artifact_are_split_at_the_last_artifacts(
    door: HttpClient, tmp_path: Path
) -> None:
    name = "a/artifacts/b"
    result = {"status": "ok", "artifacts": [{"name": "n"}]}
    spec = workflow(tmp_path, step(name, structured(result, ("n", "found"))), output_step=name)
    run_id = door.finish(spec)["id"]
    assert door.get(f"/v1/runs/{run_id}/stages/{name}/artifacts/n").body == b"found"
    assert door.get(f"/v1/runs/{run_id}/stages/{name}/output-file").json == result


# -- parts and copies ----------------------------------------------------------------------------


def test_a_copy_that_is_still_good_is_not_sent_again(
    api: HttpClient, published: dict[str, Any]
) -> None:
    path = f"/v1/runs/{published['id']}/stages/make/artifacts/note.txt"
    tag = api.get(path).headers["etag"]
    for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = api.get(path, If_None_Match=given)
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", tag)
    assert api.get(path, If_None_Match='"other"').status == 200


@pytest.mark.parametrize(
    ("asked", "status", "content", "content_range"),
    [
        ("bytes=0-2", 206, b"the", "bytes 0-2/8"),
        ("bytes=4-", 206, b"note", "bytes 4-7/8"),
        ("bytes=-4", 206, b"note", "bytes 4-7/8"),
        ("bytes=-100", 206, b"the note", "bytes 0-7/8"),
        ("bytes=7-100", 206, b"e", "bytes 7-7/8"),
        ("bytes=8-", 416, b"", "bytes */8"),
        ("bytes=100-200", 416, b"", "bytes */8"),
        ("bytes=100-", 416, b"", "bytes */8"),
        ("bytes=-0", 416, b"", "bytes */8"),
        ("bytes=0-0,2-3", 200, b"the note", None),
        ("lines=0-1", 200, b"the note", None),
        ("bytes=-", 200, b"the note", None),
        ("bytes=x-y", 200, b"the note", None),
        # RFC 9110, 14.1.1: a range whose last byte is before its first is not valid.
        ("bytes=5-2", 200, b"the note", None),
    ],
)
def test_a_part_of_an_artifact_is_sent_where_that_is_asked_for(
    door: HttpClient,
    published: dict[str, Any],
    asked: str,
    status: int,
    content: bytes,
    content_range: str | None,
) -> None:
    path = f"/v1/runs/{published['id']}/stages/make/artifacts/note.txt"
    answer = door.get(path, Range=asked)
    assert (answer.status, answer.body) == (status, content)
    assert answer.headers.get("content-range") == content_range
    assert int(answer.headers["content-length"]) == len(content)


def test_a_part_is_of_the_copy_the_client_has_or_the_whole(
    door: HttpClient, published: dict[str, Any]
) -> None:
    path = f"/v1/runs/{published['id']}/stages/make/artifacts/note.txt"
    tag = door.get(path).headers["etag"]
    assert door.get(path, Range="bytes=0-2", If_Range=tag).status == 206
    assert door.get(path, Range="bytes=0-2", If_Range='"other"').body == NOTE.encode()
    head = door.ask("HEAD", path, None, {"Range": "bytes=0-2"})
    assert (head.status, head.headers["content-length"]) == (200, "8")
    assert head.headers["accept-ranges"] == "bytes"


def test_a_large_artifact_is_sent_whole_and_in_parts(door: HttpClient, tmp_path: Path) -> None:
    result = {"status": "ok", "artifacts": [{"name": "big"}]}
    script = structured(result) + "\nseq 1 700000 > big"
    run_id = door.finish(workflow(tmp_path, step("a", script), output_step="a"))["id"]
    content = b"".join(b"%d\n" % number for number in range(1, 700001))
    path = f"/v1/runs/{run_id}/stages/a/artifacts/big"
    assert door.get(path).body == content
    far = door.get(path, Range="bytes=2000000-4000000")
    assert (far.status, far.body) == (206, content[2000000:4000001])


def test_an_empty_artifact_is_empty(door: HttpClient, tmp_path: Path) -> None:
    result = {"status": "ok", "artifacts": [{"name": "none"}]}
    script = structured(result) + "\n: > none"
    run = door.finish(workflow(tmp_path, step("a", script), output_step="a"))
    answer = door.get(f"/v1/runs/{run['id']}/stages/a/artifacts/none")
    assert (answer.status, answer.body) == (200, b"")
    assert run["artifact_publication"]["manifest"][1]["size_bytes"] == 0


# -- structured output that is owed --------------------------------------------------------------


def run_of(unix: HttpClient, folder: Path, kind: str, output: str | None) -> dict[str, Any]:
    """A run of this kind that leaves this output, or none; its stage is `it`."""
    env = {"CLAUDIO_NO_OUTPUT": "1"} if output is None else {"CLAUDIO_OUTPUT": output}
    if kind == "agent":
        return unix.finish(agent(folder, messaging=False, name="it", **env))
    if kind == "pipeline":
        return unix.finish(pipeline(folder, box("it", **env)))
    script = "echo done" if output is None else structured(output)
    return unix.finish(workflow(folder, step("it", script), output_step="it"))


@pytest.mark.parametrize("kind", ["agent", "pipeline", "workflow"])
def test_a_run_that_owes_output_and_left_none_has_failed(
    door: HttpClient, tmp_path: Path, kind: str
) -> None:
    run = run_of(door, tmp_path, kind, None)
    assert run["status"] == "failed"
    assert run["error"] == "stage 'it' completed without result.json"
    assert run["artifact_publication"] == {"status": "failed", "manifest": []}
    last = next(e for e in run["events"] if e["event_id"] == run["terminal_event_id"])
    assert last["event_type"] == "run.failed"
    assert run["stage_states"]["it"]["status"] == "succeeded"
    answer = door.get(f"/v1/runs/{run['id']}/stages/it/output-file")
    assert answer.problem == (404, "STRUCTURED_OUTPUT_MISSING", False)


@pytest.mark.parametrize("kind", ["agent", "pipeline", "workflow"])
@pytest.mark.parametrize("output", ["# a heading", '{"status": NaN}'])
def test_output_that_is_not_json_fails_a_run_that_owes_it(
    door: HttpClient, tmp_path: Path, kind: str, output: str
) -> None:
    run = run_of(door, tmp_path, kind, output)
    assert run["status"] == "failed"
    assert run["artifact_publication"]["status"] == "failed"
    (entry,) = run["artifact_publication"]["manifest"]
    assert (entry["name"], entry["media_type"]) == ("result.json", "application/octet-stream")
    answer = door.get(entry["retrieval_path"])
    assert answer.problem[1:] == ("STRUCTURED_OUTPUT_MALFORMED", False)
    assert answer.status >= 400


@pytest.mark.parametrize("kind", ["agent", "pipeline", "workflow"])
@pytest.mark.parametrize("output", ['{"result": 1}', "[1]", "7", "null"])
def test_output_without_a_status_fails_a_run_that_owes_it_and_is_sent(
    door: HttpClient, tmp_path: Path, kind: str, output: str
) -> None:
    run = run_of(door, tmp_path, kind, output)
    assert run["status"] == "failed"
    (entry,) = run["artifact_publication"]["manifest"]
    assert entry["media_type"] == "application/json"
    answer = door.get(entry["retrieval_path"])
    assert (answer.status, answer.json) == (200, json.loads(output))


def test_any_value_of_status_will_do(door: HttpClient, tmp_path: Path) -> None:
    run = run_of(door, tmp_path, "workflow", '{"status": null}')
    assert run["status"] == "succeeded"


def test_a_workflow_of_several_steps_may_publish_what_it_likes(
    door: HttpClient, tmp_path: Path
) -> None:
    for number, (output, media_type) in enumerate(
        [
            ("# text", "application/octet-stream"),
            ('{"a": 1}', "application/json"),
            ("null", "application/json"),
            ('{"status": NaN}', "application/octet-stream"),
        ]
    ):
        steps = (step("one", "true"), step("two", structured(output), "one"))
        run = door.finish(workflow(tmp_path, *steps, output_step="two", name=f"w{number}"))
        assert run["status"] == "succeeded"
        assert run["artifact_publication"] == {"status": "not_started", "manifest": []}
        answer = door.get(f"/v1/runs/{run['id']}/stages/two/output-file")
        assert (answer.status, answer.headers["content-type"]) == (200, media_type)
        assert answer.body == output.encode() + b"\n"


def test_a_workflow_that_names_no_output_step_owes_nothing_and_its_output_is_sent(
    door: HttpClient, tmp_path: Path
) -> None:
    run = door.finish(workflow(tmp_path, step("one", structured("# text"))))
    assert run["status"] == "succeeded"
    answer = door.get(f"/v1/runs/{run['id']}/stages/one/output-file")
    assert (answer.status, answer.body) == (200, b"# text\n")


def test_a_pipeline_needs_output_of_every_box(door: HttpClient, tmp_path: Path) -> None:
    run = door.finish(pipeline(tmp_path, box("p"), box("q", CLAUDIO_NO_OUTPUT="1")))
    assert run["status"] == "failed"
    assert run["error"] == "stage 'q' completed without result.json"
    assert door.get(f"/v1/runs/{run['id']}/stages/p/output-file").status == 200


def test_a_run_that_fails_by_itself_has_published_nothing(door: HttpClient, tmp_path: Path) -> None:
    for spec, error in (
        (agent(tmp_path, messaging=False, CLAUDIO_FAIL="broken"), "broken"),
        (pipeline(tmp_path, box("p", CLAUDIO_FAIL="broken"), box("q")), "box p failed: broken"),
    ):
        run = door.finish(spec)
        assert (run["status"], run["error"]) == ("failed", error)
        # It owed structured output.
        assert run["artifact_publication"] == {"status": "failed", "manifest": []}
    owing_none = door.finish(workflow(tmp_path, step("a", "false")))
    assert owing_none["artifact_publication"] == {"status": "not_started", "manifest": []}


def test_a_pipeline_that_fails_later_has_published_what_came_before(
    door: HttpClient, tmp_path: Path
) -> None:
    run = door.finish(pipeline(tmp_path, box("p"), box("q", CLAUDIO_FAIL="broken")))
    assert (run["status"], run["error"]) == ("failed", "box q failed: broken")
    assert run["artifact_publication"]["status"] == "published"
    assert [e["stage"] for e in run["artifact_publication"]["manifest"]] == ["p"]
    without = door.finish(
        pipeline(tmp_path, box("p", CLAUDIO_NO_OUTPUT="1"), box("q", CLAUDIO_FAIL="broken"))
    )
    assert (without["error"], without["terminal_reason"]) == ("box q failed: broken", None)
    assert without["artifact_publication"] == {"status": "failed", "manifest": []}


# -- agents, pipelines, restarts -----------------------------------------------------------------


def test_files_an_agent_names_are_kept(door: HttpClient, tmp_path: Path) -> None:
    output = json.dumps({"status": "ok", "artifacts": [{"name": "me", "path": "output.json"}]})
    for spec in (
        agent(tmp_path, messaging=False, name="it", CLAUDIO_OUTPUT=output),
        pipeline(tmp_path, box("it", CLAUDIO_OUTPUT=output)),
    ):
        run = door.finish(spec)
        assert run["status"] == "succeeded"
        entry = run["artifact_publication"]["manifest"][1]
        assert door.get(entry["retrieval_path"]).body == output.encode()


def test_a_box_is_published_while_the_pipeline_goes_on(door: HttpClient, tmp_path: Path) -> None:
    spec = pipeline(tmp_path, box("p"), box("q", CLAUDIO_HANG="1"))
    run_id = door.start(spec)
    door.wait_for(run_id, lambda e: e["event_type"] == "stage.started" and e["stage_name"] == "q")
    assert door.run(run_id)["status"] == "running"
    assert door.get(f"/v1/runs/{run_id}/stages/p/output-file").json["status"] == "success"
    door.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0})


@pytest.fixture
def other() -> Iterator[ApiHouse]:
    with api_house() as built:
        yield built


def test_artifacts_of_every_kind_are_there_after_the_supervisor_was_killed_and_started_again(
    other: ApiHouse, tmp_path: Path
) -> None:
    output = json.dumps({"status": "ok", "artifacts": [{"name": "me", "path": "output.json"}]})
    specs = (
        workflow(tmp_path, step("make", SCRIPT), output_step="make"),
        agent(tmp_path, messaging=False, CLAUDIO_OUTPUT=output),
        pipeline(tmp_path, box("p", CLAUDIO_OUTPUT=output), box("q")),
    )
    runs = [other.unix.finish(spec) for spec in specs]
    entries = [entry for run in runs for entry in run["artifact_publication"]["manifest"]]
    listed = [(e["stage"], e["name"]) for e in entries if e["stage"] != "make"]
    assert listed == [
        ("scout", "result.json"),
        ("scout", "me"),
        ("p", "result.json"),
        ("p", "me"),
        ("q", "result.json"),
    ]
    bodies = [other.unix.get(entry["retrieval_path"]).body for entry in entries]
    of_agents = [b for e, b in zip(entries, bodies, strict=True) if e["stage"] in ("scout", "p")]
    assert of_agents == [output.encode()] * 4
    other.restart()
    assert [other.tcp.run(run["id"]) for run in runs] == runs
    assert [other.tcp.get(entry["retrieval_path"]).body for entry in entries] == bodies


def test_output_that_is_still_to_come_is_missing_until_it_is_there(
    door: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    spec = workflow(tmp_path, step("a", f"{opened.wait}; {SCRIPT}"), output_step="a")
    run_id = door.start(spec)
    early = door.get(f"/v1/runs/{run_id}/stages/a/output-file")
    assert early.problem == (404, "STRUCTURED_OUTPUT_MISSING", False)
    opened.open()
    door.wait_end(run_id)
    assert door.get(f"/v1/runs/{run_id}/stages/a/output-file").status == 200
