"""What stage outputs come to: the manifest, and why a run that owes output failed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.actors.messages.artifacts import ManifestEntry, StoredArtifact
from voidbus.actors.workloads.publication import (
    OutputFault,
    StageOutput,
    artifact_path,
    is_artifact_name,
    manifest_of,
    output_path,
    publish,
    read_structured,
)

NOW = "2026-01-01T00:00:00Z"


def output(stage: str, fault: OutputFault | None = None, *names: str) -> StageOutput:
    stored = None
    if fault is not OutputFault.MISSING:
        stored = StoredArtifact(
            stage=stage, name="", media_type="application/json", size_bytes=7, digest="d" * 64
        )
    entries = tuple(
        ManifestEntry(
            name=name,
            stage=stage,
            media_type="text/plain",
            retrieval_path=artifact_path("r1", stage, name),
        )
        for name in names
    )
    return StageOutput(stage, stored, fault, entries)


def names_of(publication: object) -> list[tuple[str, str]]:
    manifest = publication.manifest  # type: ignore[attr-defined]
    return [(entry.stage, entry.name) for entry in manifest]


def test_each_completed_stage_has_its_result_and_the_files_it_names() -> None:
    published = publish(
        "r1",
        [output("a", None, "x.txt"), output("b")],
        required=True,
        stages_ran=True,
        now=NOW,
    )
    assert published.error is None
    assert published.publication.status == "published"
    assert published.publication.published_at == NOW
    assert names_of(published.publication) == [
        ("a", "result.json"),
        ("a", "x.txt"),
        ("b", "result.json"),
    ]
    first = published.publication.manifest[0]
    assert (first.size_bytes, first.retrieval_path) == (7, "/v1/runs/r1/stages/a/output-file")


def test_a_run_without_stages_has_not_started_to_publish() -> None:
    published = publish("r1", [], required=True, stages_ran=False, now=NOW)
    assert (published.publication.status, published.error) == ("not_started", None)


def test_stages_of_which_none_completed_have_failed_to_publish_only_where_they_owe() -> None:
    assert publish("r1", [], required=True, stages_ran=True, now=NOW).publication.status == "failed"
    owed = publish("r1", [], required=False, stages_ran=True, now=NOW)
    assert owed.publication.status == "not_started"


def test_missing_output_empties_the_manifest_and_fails_the_run() -> None:
    published = publish(
        "r1",
        [output("a"), output("b", OutputFault.MISSING)],
        required=True,
        stages_ran=True,
        now=NOW,
    )
    assert published.error == "stage 'b' completed without result.json"
    assert published.code == "STRUCTURED_OUTPUT_MISSING"
    assert published.publication.status == "failed"
    assert published.publication.manifest == ()


@pytest.mark.parametrize(
    ("fault", "media_type"),
    [
        (OutputFault.MALFORMED, "application/octet-stream"),
        (OutputFault.NO_STATUS, "application/json"),
    ],
)
def test_malformed_output_stays_listed_and_fails_the_run(
    fault: OutputFault, media_type: str
) -> None:
    published = publish(
        "r1", [output("a", fault), output("b")], required=True, stages_ran=True, now=NOW
    )
    assert published.code == "STRUCTURED_OUTPUT_MALFORMED"
    assert published.publication.status == "failed"
    (entry,) = published.publication.manifest
    assert (entry.name, entry.media_type) == ("result.json", media_type)


def test_where_nothing_is_owed_bad_output_is_passed_over() -> None:
    published = publish(
        "r1",
        [output("a", OutputFault.MISSING), output("b", OutputFault.MALFORMED), output("c")],
        required=False,
        stages_ran=True,
        now=NOW,
    )
    assert published.error is None
    assert names_of(published.publication) == [("c", "result.json")]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"status": null}', None),
        (b'{"status": "failed"}', None),
        (b"{}", OutputFault.NO_STATUS),
        (b"[]", OutputFault.NO_STATUS),
        (b"7", OutputFault.NO_STATUS),
        (b"null", OutputFault.NO_STATUS),
        (b' {"status": 1} \n', None),
        (b'{"status": NaN}', OutputFault.MALFORMED),
        (b'{"status": 1, "x": [-Infinity]}', OutputFault.MALFORMED),
        (b'\xef\xbb\xbf{"status": 1}', OutputFault.MALFORMED),
        ('{"status": 1}'.encode("utf-16"), OutputFault.MALFORMED),
        (b"words", OutputFault.MALFORMED),
        (b"", OutputFault.MALFORMED),
        (b"\xff\xfe", OutputFault.MALFORMED),
        (b"[" * 100_000, OutputFault.MALFORMED),
        (None, OutputFault.MALFORMED),
    ],
)
def test_structured_output_is_a_json_object_with_a_status(
    content: bytes | None, fault: OutputFault | None
) -> None:
    assert read_structured(content)[0] is fault


def test_named_files_have_a_type_and_a_place_by_default() -> None:
    document = {
        "status": "ok",
        "artifacts": [
            {"name": "a.txt"},
            {"name": "b", "path": "out/b.bin", "media_type": "image/png"},
            {"name": "c", "path": "/workspace/c"},
            {"path": "no-name"},
            {"name": ""},
            "words",
            None,
        ],
    }
    fault, named = read_structured(json.dumps(document).encode())
    assert fault is None
    assert [(each.name, each.media_type, each.path) for each in named] == [
        ("a.txt", "application/octet-stream", "/workspace/a.txt"),
        ("b", "image/png", "/workspace/out/b.bin"),
        ("c", "application/octet-stream", "/workspace/c"),
    ]


@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_whatever_a_guest_writes_is_judged_and_never_raises(content: bytes) -> None:
    fault, named = read_structured(content)
    assert fault is None or named == []


@pytest.mark.parametrize("name", ["", " ", "..", "a/b", "a\\b", "../x", "a..b", "\0"])
def test_names_that_are_no_part_of_a_path_are_not_kept(name: str) -> None:
    assert not is_artifact_name(name)


def test_paths_are_percent_encoded() -> None:
    assert output_path("r1", "a b/c") == "/v1/runs/r1/stages/a%20b%2Fc/output-file"
    assert artifact_path("r1", "s", "ä.txt") == "/v1/runs/r1/stages/s/artifacts/%C3%A4.txt"


def test_a_stage_without_an_output_file_has_no_line_of_its_own() -> None:
    assert manifest_of("r1", output("a", OutputFault.MISSING)) == []
