"""The supervisor's configuration: its sources, their order, and their errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from voidbus.spec.problem import SpecError
from voidbus.spec.supervisor import SupervisorConfig, load_supervisor_config

CONFIGS = Path(__file__).parents[2] / "configs"
HOME = {"HOME": "/home/u"}


def test_the_example_states_the_defaults() -> None:
    config = load_supervisor_config(CONFIGS / "supervisor.yaml", HOME, {})
    assert config == SupervisorConfig(state_dir=Path("/home/u/.local/state/voidbus"))
    assert config == load_supervisor_config(None, HOME, {})


def test_a_flag_stands_over_a_variable_and_a_variable_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("max_parallel_runs: 1\nstop_deadline_secs: 1\nlog: {level: error}\n")
    environ = {**HOME, "VOIDBUS_MAX_PARALLEL_RUNS": "2", "VOIDBUS_LOG_LEVEL": "debug"}
    flags = {"max_parallel_runs": 3, "state_dir": tmp_path, "log.format": None}
    config = load_supervisor_config(path, environ, flags)
    assert (config.max_parallel_runs, config.stop_deadline_secs) == (3, 1.0)
    assert (config.log.level, config.log.format, config.state_dir) == ("debug", "text", tmp_path)


def test_variables_nest_by_two_underscores_and_an_empty_one_is_unset() -> None:
    environ = {
        "VOIDBUS_STATE_DIR": "/s",
        "VOIDBUS_TELEMETRY__INTERVAL_SECS": "0.5",
        "VOIDBUS_TELEMETRY__BUFFER_SIZE": "",
        "VOIDBUS_REQUIRE": "kvm",
    }
    config = load_supervisor_config(CONFIGS / "supervisor.yaml", {**HOME, **environ}, {})
    assert config.telemetry.buffer_size == 5000
    assert (config.telemetry.interval_secs, config.state_dir) == (0.5, Path("/s"))


def test_the_default_file_is_read_where_it_exists(tmp_path: Path) -> None:
    (tmp_path / "voidbus").mkdir()
    (tmp_path / "voidbus" / "supervisor.yaml").write_text("max_parallel_runs: 7\n")
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_STATE_HOME": "/x", "HOME": "/h"}
    config = load_supervisor_config(None, environ, {})
    assert (config.max_parallel_runs, config.state_dir) == (7, Path("/x/voidbus"))


ERRORS: list[tuple[str, dict[str, str], dict[str, object], str]] = [
    ("log: {levl: info}", {}, {}, "s.yaml:1:7: log.levl: unknown field. Did you mean 'level'?"),
    ("log: {level: inof}", {}, {}, "allowed debug, info, warning, error). Did you mean 'info'?"),
    (
        "{}",
        {"VOIDBUS_MAX_PARALLEL_RUNS": "many"},
        {},
        "VOIDBUS_MAX_PARALLEL_RUNS: max_parallel_runs: must be a whole number (found 'many')",
    ),
    ("{}", {"VOIDBUS_LOG__LEVL": "info"}, {}, "Did you mean 'VOIDBUS_LOG__LEVEL'?"),
    (
        "{}",
        {"VOIDBUS_LOG__LEVEL": "info", "VOIDBUS_LOG_LEVEL": "debug"},
        {},
        "says other than VOIDBUS_LOG",
    ),
    ("{}", {}, {"max_parallel_runs": 0}, "flag max_parallel_runs: max_parallel_runs: is out of"),
    ("{}", {}, {"log.levl": "info"}, "flag log.levl: no such field. Did you mean 'log.level'?"),
    ("telemetry: {interval_secs: .inf}", {}, {}, "telemetry.interval_secs: must be a number"),
    ("stop_deadline_secs: true", {}, {}, "must be a number"),
]


@pytest.mark.parametrize(("text", "environ", "flags", "message"), ERRORS)
def test_a_mistake_names_its_source(
    tmp_path: Path, text: str, environ: dict[str, str], flags: dict[str, object], message: str
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_supervisor_config(path, {**HOME, **environ}, flags)
    assert message in str(caught.value)


def test_a_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        load_supervisor_config(tmp_path / "none.yaml", HOME, {})
