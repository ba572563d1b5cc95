"""Where the API listens and who gets in (contract 1.2)."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_kit import TOKEN, ApiHouse
from http_kit import HttpClient, free_port
from supervisor_kit import PATIENCE, Supervisor, running_supervisor

from voidbus.gateway.token import authorized

ROUTES = [
    ("GET", "/v1/health"),
    ("GET", "/v1/runs"),
    ("POST", "/v1/runs"),
    ("GET", "/v1/runs/x"),
    ("GET", "/v1/runs/x/events"),
    ("GET", "/v1/runs/x/events/stream"),
    ("GET", "/v1/runs/x/logs"),
    ("POST", "/v1/runs/x/cancel"),
    ("GET", "/v1/runs/x/stages"),
    ("GET", "/v1/runs/x/telemetry"),
    ("GET", "/v1/runs/x/stages/s/output-file"),
    ("GET", "/v1/runs/x/stages/s/artifacts/a"),
    ("PUT", "/v1/runs/x/inbox"),
    ("GET", "/v1/runs/x/intents"),
    ("POST", "/v1/runs/x/messages"),
    ("GET", "/v1/sessions/s/messages"),
    ("POST", "/v1/sessions/s/messages"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("PROPFIND", "/v1/health"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_over_tcp_nothing_is_answered_without_the_token(
    tcp: HttpClient, method: str, path: str
) -> None:
    nobody = HttpClient(tcp.where)
    answer = nobody.ask(method, path, b"{")
    assert answer.problem == (401, "UNAUTHORIZED", False)
    assert answer.json["message"] == "missing or invalid bearer token"


@pytest.mark.parametrize(
    "header",
    [
        "",
        TOKEN,
        "Bearer",
        "Bearer ",
        f"bearer {TOKEN}",
        f"BEARER {TOKEN}",
        f"Basic {TOKEN}",
        f"Token {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        f"Bearer {TOKEN}, Bearer {TOKEN}",
        f"Bearer x {TOKEN}",
        f"Bearer\t{TOKEN}",
        "Bearer ü".encode().decode("latin-1"),
        "Bearer " + "x" * 8000,
    ],
)
def test_a_header_that_is_not_bearer_and_the_token_is_refused(tcp: HttpClient, header: str) -> None:
    nobody = HttpClient(tcp.where)
    answer = nobody.ask("GET", "/v1/health", None, {"Authorization": header})
    assert answer.problem == (401, "UNAUTHORIZED", False)


@pytest.mark.parametrize(
    "value", [b"Bearer \xff", b"Bearer \xed\xa0\x80", b"Bearer " + bytes(range(128, 256)), b"\xff"]
)
def test_a_header_that_is_no_text_is_refused_and_leaves_nothing_in_the_log(
    tcp: HttpClient, house: ApiHouse, value: bytes
) -> None:
    before = house.supervisor.log
    head = HttpClient(tcp.where).head_bytes("GET /v1/health HTTP/1.1")
    received = tcp.raw(head.replace(b"\r\n\r\n", b"\r\nAuthorization: " + value + b"\r\n\r\n"))
    assert received.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert b'"code": "UNAUTHORIZED"' in received
    assert house.supervisor.log == before


def test_a_token_of_the_environment_may_be_any_bytes() -> None:
    token = b"\xfftoken".decode(errors="surrogateescape")
    assert authorized(f"Bearer {token}", token)
    assert not authorized("Bearer \ufffdtoken", token)


@pytest.mark.parametrize("name", ["Authorization", "authorization", "AUTHORIZATION"])
@pytest.mark.parametrize("space", ["", " ", "  "])
def test_the_name_of_the_header_is_any_case_and_the_token_is_trimmed(
    tcp: HttpClient, name: str, space: str
) -> None:
    nobody = HttpClient(tcp.where)
    answer = nobody.ask("GET", "/v1/health", None, {name: f"Bearer {space}{TOKEN}{space}"})
    assert answer.status == 200


def test_a_token_in_the_query_is_none(tcp: HttpClient) -> None:
    nobody = HttpClient(tcp.where)
    for query in (f"token={TOKEN}", f"access_token={TOKEN}", f"Authorization=Bearer%20{TOKEN}"):
        assert nobody.get(f"/v1/health?{query}").status == 401


def test_a_connection_that_was_let_in_once_must_show_its_token_again(tcp: HttpClient) -> None:
    nobody = HttpClient(tcp.where)
    with tcp.open() as connection:
        assert tcp.ask("GET", "/v1/health", connection=connection).status == 200
        assert nobody.ask("GET", "/v1/health", connection=connection).status == 401


def test_a_unix_socket_asks_for_no_token_and_minds_none(unix: HttpClient) -> None:
    assert unix.get("/v1/health").status == 200
    assert unix.get("/v1/health", Authorization="Bearer wrong").status == 200


def test_a_unix_socket_is_its_owners_alone(house: ApiHouse) -> None:
    path = Path(f"{house.supervisor.state_dir}.api")
    mode = path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


# -- sockets -------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: paths of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="vb-") as name:
        yield Path(name)


def refusal(supervisor: Supervisor) -> str:
    """Start a supervisor that can't: what it says."""
    supervisor.state_dir.parent.mkdir(parents=True, exist_ok=True)
    process = supervisor.start().process
    assert process is not None
    try:
        assert process.wait(PATIENCE) != 0
    finally:
        supervisor.close()
    assert "Traceback" not in supervisor.log
    return supervisor.log


def on(folder: Path, address: str, **environment: str) -> Supervisor:
    return Supervisor(folder / "state", VOIDBUS_API__LISTEN=address, **environment)


def serving(supervisor: Supervisor, check: Callable[[], None]) -> None:
    """Check something while it is up."""
    supervisor.start()
    try:
        with supervisor.connect():
            check()
    finally:
        supervisor.close()


def test_a_socket_left_by_a_process_that_died_is_replaced(folder: Path) -> None:
    path = folder / "left.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert path.is_socket()

    def check() -> None:
        assert HttpClient(path).get("/v1/health").status == 200

    serving(on(folder, f"unix://{path}"), check)
    # And nothing is left by one that ends well.
    assert not path.exists()


def test_a_socket_somebody_serves_is_left_alone(house: ApiHouse, folder: Path) -> None:
    path = Path(f"{house.supervisor.state_dir}.api")
    assert str(path) in refusal(on(folder, f"unix://{path}"))
    assert house.unix.get("/v1/health").status == 200


def test_a_file_that_is_no_socket_is_left_alone(folder: Path) -> None:
    path = folder / "precious"
    path.write_text("mine")
    assert "not a socket" in refusal(on(folder, f"unix://{path}"))
    assert path.read_text() == "mine"


def test_folders_above_a_socket_are_made(folder: Path) -> None:
    path = folder / "a" / "b" / "api.sock"

    def check() -> None:
        assert HttpClient(path).get("/v1/health").status == 200

    serving(on(folder, f"unix://{path}"), check)


def test_by_default_it_listens_where_clients_look(folder: Path) -> None:
    runtime, temporary = folder / "run", folder / "tmp"
    runtime.mkdir()
    temporary.mkdir()
    environment = dict.fromkeys(("XDG_RUNTIME_DIR", "TMPDIR"), "")
    for given, path in (
        ({"XDG_RUNTIME_DIR": str(runtime)}, runtime / "voidbox.sock"),
        (
            {"XDG_RUNTIME_DIR": str(folder / "nothing"), "TMPDIR": str(temporary)},
            temporary / f"voidbox-{os.geteuid()}.sock",
        ),
    ):
        supervisor = Supervisor(folder / "state", **{**environment, **given})
        del supervisor.environment["VOIDBUS_API__LISTEN"]

        def check(path: Path = path) -> None:
            assert HttpClient(path).get("/v1/health").status == 200

        serving(supervisor, check)


@pytest.mark.parametrize(
    "address",
    ["unix://", "unix://relative/path", "tcp://localhost:1", "tcp://127.0.0.1", "127.0.0.1:x"],
)
def test_an_address_that_is_none_is_refused_with_what_to_write(folder: Path, address: str) -> None:
    text = refusal(on(folder, address))
    assert address in text


def test_tcp_may_be_named_without_its_scheme(folder: Path) -> None:
    port = free_port()

    def check() -> None:
        assert HttpClient(("127.0.0.1", port), TOKEN).get("/v1/health").status == 200

    serving(on(folder, f"127.0.0.1:{port}", VOIDBOX_DAEMON_TOKEN=TOKEN), check)


def test_a_tcp_port_somebody_has_is_refused(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in refusal(on(folder, f"tcp://{address}", VOIDBOX_DAEMON_TOKEN=TOKEN))


# -- beyond this host ----------------------------------------------------------------------------


def test_an_address_beyond_this_host_is_refused_without_encryption(folder: Path) -> None:
    text = refusal(on(folder, "tcp://0.0.0.0:0", VOIDBOX_DAEMON_TOKEN=TOKEN))
    assert "api.tls_certificate" in text
    assert "api.plain_http" in text


def test_an_address_beyond_this_host_is_served_where_that_was_said(folder: Path) -> None:
    port = free_port()

    def check() -> None:
        assert HttpClient(("127.0.0.1", port), TOKEN).get("/v1/health").status == 200
        assert HttpClient(("127.0.0.1", port)).get("/v1/health").status == 401

    plain = {"VOIDBUS_API__PLAIN_HTTP": "true", "VOIDBOX_DAEMON_TOKEN": TOKEN}
    serving(on(folder, f"tcp://0.0.0.0:{port}", **plain), check)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that vouches for itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=voidbus"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return files


def test_tcp_is_encrypted_with_a_certificate(folder: Path, certificate: tuple[Path, Path]) -> None:
    port = free_port()
    trusting = ssl.create_default_context(cafile=str(certificate[0]))

    def check() -> None:
        client = HttpClient(("127.0.0.1", port), TOKEN, trusting)
        assert client.get("/v1/health").status == 200
        assert HttpClient(("127.0.0.1", port), None, trusting).get("/v1/health").status == 401
        # Who speaks no TLS gets nothing.
        assert b"HTTP" not in HttpClient(("127.0.0.1", port), TOKEN).raw(b"GET / HTTP/1.0\r\n\r\n")
        old = ssl.create_default_context(cafile=str(certificate[0]))
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            HttpClient(("127.0.0.1", port), TOKEN, old).get("/v1/health")

    environment = {
        "VOIDBUS_API__TLS_CERTIFICATE": str(certificate[0]),
        "VOIDBUS_API__TLS_KEY": str(certificate[1]),
        "VOIDBOX_DAEMON_TOKEN": TOKEN,
    }
    supervisor = on(folder, f"tcp://0.0.0.0:{port}", **environment)
    serving(supervisor, check)
    assert "Traceback" not in supervisor.log


def test_a_certificate_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "cert.pem"
    wrong.write_text("nothing")
    text = refusal(
        on(
            folder,
            "tcp://127.0.0.1:0",
            VOIDBUS_API__TLS_CERTIFICATE=str(wrong),
            VOIDBOX_DAEMON_TOKEN=TOKEN,
        )
    )
    assert str(wrong) in text


# -- where the token comes from ------------------------------------------------------------------


def with_token(folder: Path, token: str | None, **environment: str) -> None:
    """Start with this environment; this token, and no other, is let in."""
    port = free_port()
    nothing = {
        "VOIDBOX_DAEMON_TOKEN": "",
        "VOIDBOX_DAEMON_TOKEN_FILE": "",
        "XDG_CONFIG_HOME": str(folder / "config"),
    }
    supervisor = on(folder, f"tcp://127.0.0.1:{port}", **{**nothing, **environment})

    def check() -> None:
        expected = token or (folder / "config/voidbox/daemon-token").read_text().strip()
        assert HttpClient(("127.0.0.1", port), expected).get("/v1/health").status == 200
        assert HttpClient(("127.0.0.1", port), "other").get("/v1/health").status == 401
        assert expected not in supervisor.log

    serving(supervisor, check)


def token_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_token_file_of_the_configuration_stands_over_the_environment(folder: Path) -> None:
    with_token(
        folder,
        "first",
        VOIDBUS_API__TOKEN_FILE=token_file(folder / "one", " first \n"),
        VOIDBOX_DAEMON_TOKEN_FILE=token_file(folder / "two", "second"),
        VOIDBOX_DAEMON_TOKEN="third",
    )


def test_a_token_file_of_the_environment_stands_over_its_token(folder: Path) -> None:
    with_token(
        folder,
        "second",
        VOIDBOX_DAEMON_TOKEN_FILE=token_file(folder / "two", "second\n"),
        VOIDBOX_DAEMON_TOKEN="third",
    )


def test_a_token_nobody_gave_is_made_anew_at_each_start(folder: Path) -> None:
    path = folder / "config/voidbox/daemon-token"
    with_token(folder, None)
    first = path.read_text().strip()
    assert len(first) == 64
    assert set(first) <= set("0123456789abcdef")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with_token(folder, None, VOIDBOX_DAEMON_TOKEN="  ")
    assert path.read_text().strip() != first
    assert [each.name for each in path.parent.iterdir()] == ["daemon-token"]


@pytest.mark.parametrize(
    ("text", "mode"), [("secret", 0o640), ("secret", 0o604), ("secret", 0o610), (" \n", 0o600)]
)
def test_a_token_file_others_can_use_or_that_is_empty_is_refused(
    folder: Path, text: str, mode: int
) -> None:
    path = token_file(folder / "token", text, mode)
    said = refusal(on(folder, "tcp://127.0.0.1:0", VOIDBOX_DAEMON_TOKEN_FILE=path))
    assert path in said
    assert "secret" not in said


def test_a_token_file_that_is_not_there_is_refused(folder: Path) -> None:
    path = str(folder / "nothing")
    said = refusal(on(folder, "tcp://127.0.0.1:0", VOIDBOX_DAEMON_TOKEN_FILE=path))
    assert path in said


def test_the_api_may_be_off(folder: Path) -> None:
    with running_supervisor(VOIDBUS_API__LISTEN="off") as supervisor:
        with supervisor.connect():
            pass
        assert not Path(f"{supervisor.state_dir}.api").exists()
