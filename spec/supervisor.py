"""The supervisor's configuration: a file, over it the environment, over that the flags."""

import os
import pwd
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field

from voidbus.spec.document import format_of, parse_document, read_bytes
from voidbus.spec.machines import MachinesConfig
from voidbus.spec.model import ConfigModel, PathText
from voidbus.spec.node import Node, mapping
from voidbus.spec.policy import U64_MAX
from voidbus.spec.problem import Location, Position, Problem, SpecError, field_path, nearest
from voidbus.spec.scalar import resolve
from voidbus.spec.validation import validate

_PREFIX = "VOIDBUS_"
_NESTING = "__"


def _number(value: Any) -> Any:
    """A whole number does where any number is wanted; true and false don't."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


PositiveSeconds = Annotated[float, BeforeValidator(_number), Field(gt=0, le=86_400.0)]


class TelemetryConfig(ConfigModel):
    """How often the host is sampled, and how many samples a run keeps (the API's ring: 5000)."""

    interval_secs: PositiveSeconds = 1.0
    buffer_size: Annotated[int, Field(ge=1, le=1_000_000)] = 5000


TcpAddress = Annotated[
    str, Field(pattern=r"^tcp://[^\s/:]+:[0-9]{1,5}$|^tcp://\[[^\s/]+\]:[0-9]{1,5}$")
]


class RemoteConfig(ConfigModel):
    """Where the supervisor listens for other machines, by tcp and with CURVE keys; by default
    nowhere. `keys` is a folder (default: `keys` in the state directory)."""

    observe: TcpAddress | None = None
    operate: TcpAddress | None = None
    topics: TcpAddress | None = None
    keys: PathText | None = None


Listen = Annotated[str, Field(pattern=r"^(unix://\S+|tcp://\S+|off|[0-9.]+:[0-9]{1,5})$")]


class ApiConfig(ConfigModel):
    """The HTTP API. `listen` is `unix:///PATH`, `tcp://IP:PORT`, or `off`; None is the first usable
    of $XDG_RUNTIME_DIR/voidbox.sock, $TMPDIR/voidbox-UID.sock and /tmp/voidbox-UID.sock, where
    clients look for it. `also_listen` is a second address. `token_file` holds the bearer token
    of TCP. `tls_certificate` and `tls_key` are PEM files; without them an address that is not of
    the loopback is refused, unless `plain_http` says that the network is trusted."""

    listen: Listen | None = None
    also_listen: Listen | None = None
    token_file: PathText | None = None
    tls_certificate: PathText | None = None
    tls_key: PathText | None = None
    plain_http: bool = False


class RetentionConfig(ConfigModel):
    """How long ended runs are kept: `max_age_days` after their end, and the oldest go when all take
    up more than `max_bytes`. None keeps them."""

    max_age_days: Annotated[float, BeforeValidator(_number), Field(ge=0, le=36_500)] | None = None
    max_bytes: Annotated[int, Field(ge=0, le=U64_MAX)] | None = None


class LogConfig(ConfigModel):
    """What the supervisor logs, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class SupervisorConfig(ConfigModel):
    """The supervisor's configuration. Deadlines are in seconds."""

    state_dir: PathText
    max_parallel_runs: Annotated[int, Field(ge=1, le=10_000)] = 256
    stop_deadline_secs: PositiveSeconds = 30.0
    adoption_deadline_secs: PositiveSeconds = 10.0
    telemetry: TelemetryConfig = TelemetryConfig()
    api: ApiConfig = ApiConfig()
    remote: RemoteConfig = RemoteConfig()
    retention: RetentionConfig = RetentionConfig()
    machines: MachinesConfig = MachinesConfig()
    log: LogConfig = LogConfig()


def load_supervisor_config(
    path: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]
) -> SupervisorConfig:
    """The configuration in `path` (None: the default file, where there is one), overlaid with
    VOIDBUS_* variables and then with `flags`.

    A field's variable is its path in capitals, nested by two underscores (`VOIDBUS_LOG__LEVEL`);
    one underscore will do (`VOIDBUS_LOG_LEVEL`). An empty variable counts as unset. A flag's key is
    the field's path (`log.level`); a flag of None is not given.

    Raises SpecError with every problem, naming the file's line, the variable or the flag.
    """
    root = _file(path, environ)
    fields = dict(_leaves(SupervisorConfig, ()))
    problems: list[Problem] = []
    for location, node in _variables(fields, environ, problems):
        root = root.with_value(location, node)
    for location, node in _flags(fields, flags, problems):
        root = root.with_value(location, node)
    if root.at(("state_dir",)) is None:
        root = root.with_value(("state_dir",), _default_state_dir(environ))
    config, found = validate(SupervisorConfig, root, "error")
    if config is None or problems:
        raise SpecError([*problems, *found])
    return config


def default_config_path(environ: Mapping[str, str]) -> Path | None:
    """`$XDG_CONFIG_HOME/voidbus/supervisor.yaml`; None without a home directory."""
    base = _base_directory(environ, "XDG_CONFIG_HOME", ".config")
    return base / "voidbus" / "supervisor.yaml" if base else None


def _file(path: Path | None, environ: Mapping[str, str]) -> Node:
    if path is None:
        path = default_config_path(environ)
        if path is None or not os.path.lexists(path):  # a dangling link is a mistake to report
            return mapping(Position("default configuration"), {})
    return parse_document(read_bytes(path), source=str(path), format=format_of(path))


def _default_state_dir(environ: Mapping[str, str]) -> Node:
    position = Position("default configuration")
    base = _base_directory(environ, "XDG_STATE_HOME", ".local/state")
    if base is None:
        message = "there is no home directory to keep state in; set VOIDBUS_STATE_DIR"
        raise SpecError([Problem(position, "state_dir", message)])
    return Node(position, value=str(base / "voidbus"))


def _base_directory(environ: Mapping[str, str], variable: str, under_home: str) -> Path | None:
    # The XDG base directory specification: a relative path is invalid and is ignored.
    given = Path(environ.get(variable, ""))
    if given.is_absolute():
        return given
    home = environ.get("HOME") or _account_home()
    return Path(home) / under_home if home else None


def _account_home() -> str | None:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a user id without an account, as in some containers
        return None


def _leaves(
    model: type[BaseModel], location: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field that has a value of its own, and the optional sections (which can be null)."""
    for name, field in model.model_fields.items():
        place = (*location, name)
        members = (field.annotation, *get_args(field.annotation))
        section = next(
            (each for each in members if isinstance(each, type) and issubclass(each, BaseModel)),
            None,
        )
        if section is None or section is not field.annotation:
            yield place, field.annotation
        if section is not None:
            yield from _leaves(section, place)


def _variables(
    fields: Mapping[tuple[str, ...], Any], environ: Mapping[str, str], problems: list[Problem]
) -> Iterator[tuple[Location, Node]]:
    known: dict[str, tuple[str, ...]] = {}
    for location in fields:
        for joint in (_NESTING, "_"):
            known[_PREFIX + joint.join(location).upper()] = location
    used: dict[tuple[str, ...], str] = {}
    for name in sorted(environ, key=lambda name: known.get(name, ())):
        text = environ[name]
        if not name.startswith(_PREFIX) or not text:
            continue
        place = known.get(name)
        position = Position(f"environment variable {name}")
        if place is None:
            # Others own variables of this prefix too; one with a section's name is meant for us.
            if _NESTING in name:
                near = nearest(name, [each.lower() for each in known])
                suggestion = near.upper() if near else None
                message = "no such configuration field"
                problems.append(Problem(position, "", message, suggestion=suggestion))
        elif place in used and environ[used[place]] != text:
            message = f"says other than {used[place]}; unset one of them"
            problems.append(Problem(position, field_path(place), message))
        else:
            used[place] = name
            yield place, Node(position, value=resolve(text), text=text)


def _flags(
    fields: Mapping[tuple[str, ...], Any], flags: Mapping[str, object], problems: list[Problem]
) -> Iterator[tuple[Location, Node]]:
    names = {".".join(location): location for location in fields}
    for name, value in flags.items():
        if value is None:
            continue
        position = Position(f"flag {name}")
        if name not in names:
            suggestion = nearest(name, names)
            problems.append(Problem(position, "", "no such field", suggestion=suggestion))
        elif isinstance(value, str | int | float):
            yield names[name], Node(position, value=value)
        elif isinstance(value, Path):
            yield names[name], Node(position, value=str(value))
        else:
            found = type(value).__name__
            problems.append(Problem(position, name, "must be text or a number", found))
