"""From the configuration to listening sockets: what the gateway is opened with."""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from voidbus.gateway.listen import (
    Address,
    AddressInUse,
    ListenError,
    TcpAddress,
    bind,
    default_address,
    parse_address,
    unlink,
)
from voidbus.gateway.server import Door
from voidbus.gateway.token import TokenError, server_token
from voidbus.spec.supervisor import ApiConfig

log = logging.getLogger("voidbus.gateway")

OFF = "off"


@dataclass(frozen=True)
class Opened:
    """Doors, and how clients find them."""

    doors: tuple[Door, ...]
    addresses: tuple[Address, ...]
    urls: tuple[str, ...]

    def close(self) -> None:
        """Close the sockets and remove what they left in the file system."""
        for door, address in zip(self.doors, self.addresses, strict=True):
            door.listener.close()
            unlink(address)


def open_doors(config: ApiConfig, environ: Mapping[str, str]) -> Opened:
    """Listen where the configuration says. Raises ListenError, TokenError.

    The place where clients look by default is left to another supervisor that has it.
    """
    wanted = [text for text in (config.listen, config.also_listen) if text not in (None, OFF)]
    addresses: list[Address] = [parse_address(text) for text in wanted if text is not None]
    for address in addresses:
        _check_exposure(address, config)
    tls = _tls(config)
    token: str | None = None
    doors: list[Door] = []
    kept: list[Address] = []
    with contextlib.ExitStack() as undo:
        if config.listen is None:
            default = default_address(environ)
            try:
                listener = bind(default)
            except AddressInUse as error:
                log.warning("%s", error)
            else:
                undo.callback(unlink, default)
                undo.callback(listener.close)
                doors.append(Door(listener))
                kept.append(default)
        for address in addresses:
            over_tcp = isinstance(address, TcpAddress)
            if over_tcp and token is None:
                token = server_token(config.token_file, environ)
            listener = bind(address)
            undo.callback(unlink, address)
            undo.callback(listener.close)
            doors.append(Door(listener, token if over_tcp else None, tls if over_tcp else None))
            kept.append(address)
        undo.pop_all()
    return Opened(tuple(doors), tuple(kept), tuple(map(_url, doors, kept)))


def _url(door: Door, address: Address) -> str:
    if not isinstance(address, TcpAddress):
        return str(address)
    # The port the kernel gave, where none was named.
    bound = TcpAddress(address.host, door.listener.getsockname()[1])
    return f"{'https' if door.tls is not None else 'http'}://{bound}"


def _check_exposure(address: Address, config: ApiConfig) -> None:
    """Raises ListenError for an address beyond this host without encryption."""
    if not isinstance(address, TcpAddress) or address.loopback:
        return
    if config.tls_certificate is None and not config.plain_http:
        raise ListenError(
            f"the HTTP API at {address} would be reached from other hosts without encryption: set "
            "api.tls_certificate and api.tls_key, or api.plain_http where the network is trusted"
        )


def _tls(config: ApiConfig) -> ssl.SSLContext | None:
    if config.tls_certificate is None:
        if config.tls_key is not None:
            raise ListenError("api.tls_key is set without api.tls_certificate; set both")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ListenError(
            f"api.tls_certificate {config.tls_certificate}: {error}; it must be a PEM file with "
            "the certificate chain, and api.tls_key its key"
        ) from error
    return context


__all__ = ["ListenError", "Opened", "TokenError", "open_doors"]
