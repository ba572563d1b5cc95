"""What the host says on the kernel command line: a pure parser of its keys.

Keys of the protocol ("Guest agent boot"): ``voidbox.secret``, ``voidbox.clock``,
``voidbox.network=1``, or in its place the kernel's own ``virtio_mmio.device=`` of the network
card, ``voidbox.mount<N>=mount<N>:<guest path>:<ro|rw>``, ``voidbox.oci_rootfs=<path>``,
``voidbox.oci_rootfs_dev=<device>``. Our own:
``voidbus.hostname=``, ``voidbus.net=<address>/<prefix>,<gateway>[,<DNS server>...]``,
``voidbus.layers=vda,vdb``, ``voidbus.more=vda``, ``voidbus.marks=<address>``.

A value that can't be used becomes a fault, never an exception: a machine that stays silent is
worse than one that says what it lacks. A fault never repeats the secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

SECRET_DIGITS = 64
"""Hexadecimal digits of the secret (protocol, "Handshake": 32 bytes)."""

TAG_BYTES = 36
"""Longest tag of a virtio file system (virtio 1.2, 5.11.4)."""

MORE_BYTES = 64 * 1024
"""How much of the device of ``voidbus.more`` is read."""

CLOCK_LIMIT = 2**33
"""The latest time believed, in seconds since 1970: the year 2242."""

_PAGE = 4096
_ADDRESS_END = 1 << 32
"""Registers that are to be told something lie below: there every host has its devices."""

RESERVED = ("/proc", "/sys", "/dev", "/run/voidbus", "/opt/voidbus", "/usr/lib/voidbus")
"""Where nothing of the host may be mounted over, nor below."""

# Protocol, "Guest agent boot": the addresses, and either of what says that there is a card.
_DEFAULT_NETWORK = "10.0.2.15/24,10.0.2.2,10.0.2.3"
_NETWORK_SAID = frozenset({("voidbox.network", "1"), ("virtio_mmio.device", "512@0xd0000000:10")})
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")


class Share(NamedTuple):
    """A directory of the host: the ``tag`` of its device, where the guest sees it, and whether
    it may write there."""

    tag: str
    guest_path: str
    writable: bool


class NetworkSettings(NamedTuple):
    """The address of eth0 with the length of its network's prefix in bits, the gateway, and
    the DNS servers; all IPv4 in dotted decimal."""

    address: str
    prefix: int
    gateway: str
    dns: tuple[str, ...]


class BootLine:
    """The keys, each with what it means when it is absent: None, or an empty tuple.

    ``clock`` is seconds since 1970; ``marks`` is the address of the register that is told how far
    the boot has come; ``layers``, ``rootfs_device`` and ``more``, which holds further keys, are
    paths below /dev; ``rootfs_path`` is where the root file system was or is to
    be mounted; ``restart`` tells that the machine ends by a restart (``reboot=t``) and not by
    turning its power off; ``faults`` are the values that could not be used.
    """

    def __init__(self) -> None:
        self.secret: bytes | None = None
        self.clock: float | None = None
        self.hostname: str | None = None
        self.marks: int | None = None
        self.network: NetworkSettings | None = None
        self.shares: tuple[Share, ...] = ()
        self.layers: tuple[str, ...] = ()
        self.more: str | None = None
        self.rootfs_device: str | None = None
        self.rootfs_path: str | None = None
        self.restart = False
        self.faults: tuple[str, ...] = ()


def split_parameters(text: str) -> Iterator[tuple[str, str]]:
    """Keys and values as the kernel takes them apart (lib/cmdline.c, ``next_arg``): blanks
    separate, double quotes hold blanks together, ``--`` ends them."""
    word, quoted = "", False
    for character in text + " ":
        if character == '"':
            quoted = not quoted
        elif character.isspace() and not quoted:
            if word == "--":
                return
            if word:
                key, _, value = word.partition("=")
                yield key, value
            word = ""
        else:
            word += character
    if word:  # a quote that was never closed
        key, _, value = word.rstrip().partition("=")
        yield key, value


def parse_boot_line(text: str) -> BootLine:
    """The machine's keys out of the kernel command line. Never raises; the last of a repeated
    key counts."""
    line = BootLine()
    parameters = tuple(split_parameters(text))
    values = dict(parameters)
    faults: list[str] = []
    _read_identity(line, values, faults)
    # Of the parameters, since each device has a virtio_mmio.device= of its own.
    network_said = not _NETWORK_SAID.isdisjoint(parameters)
    _read_network(line, values.get("voidbus.net"), network_said, faults)
    _read_roots(line, values, faults)
    shares = []
    for key, value in values.items():
        number = key.removeprefix("voidbox.mount")
        if number == key or not (number.isascii() and number.isdigit()):
            continue
        share = _share(value)
        if isinstance(share, str):
            faults.append(f"{key}={_shown(value)}: {share}")
        else:
            shares.append((int(number), share))
    line.shares = tuple(share for _, share in sorted(shares))
    line.restart = "reboot" in values
    line.faults = tuple(faults)
    return line


def with_more(text: str, data: bytes) -> str:
    """The command line with the keys of another device after it: text up to the first NUL."""
    return f"{text.rstrip()} {data.partition(bytes(1))[0].decode(errors='replace')}"


def without_secret(text: str) -> str:
    """The command line as programs may see it."""
    shown = " ".join(word for word in text.split() if "voidbox.secret" not in word)
    return shown + "\n"


def _read_identity(line: BootLine, values: dict[str, str], faults: list[str]) -> None:
    secret = values.get("voidbox.secret")
    if secret is None:
        faults.append("voidbox.secret is not on the command line: no host can connect")
    elif len(secret) == SECRET_DIGITS and all(c in "0123456789abcdefABCDEF" for c in secret):
        line.secret = bytes.fromhex(secret)
    else:
        faults.append(f"voidbox.secret is not {SECRET_DIGITS} hexadecimal digits: nobody connects")
    clock = values.get("voidbox.clock")
    if clock is not None:
        line.clock = _clock(clock)
        if line.clock is None:
            faults.append(f"voidbox.clock={_shown(clock)}: not seconds since 1970")
    marks = values.get("voidbus.marks")
    if marks is not None:
        line.marks = _page(marks)
        if line.marks is None:
            faults.append(f"voidbus.marks={_shown(marks)}: not the address of a page below 4 GiB")
    hostname = values.get("voidbus.hostname")
    if hostname is not None:
        if _is_hostname(hostname):
            line.hostname = hostname
        else:
            faults.append(f"voidbus.hostname={_shown(hostname)}: not 1 to 63 letters, digits or -")


def _page(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_ADDRESS_END))):
        return None
    address = int(text)
    return address if address < _ADDRESS_END and address % _PAGE == 0 else None


def _clock(text: str) -> float | None:
    whole, _, fraction = text.partition(".")
    if not whole.isascii() or not whole.isdigit() or len(whole) > 12:
        return None
    if fraction and not (fraction.isascii() and fraction.isdigit()):
        return None
    value = float(text)
    return value if value < CLOCK_LIMIT else None


def _is_hostname(text: str) -> bool:
    return 0 < len(text) <= 63 and all(c in _LETTERS or c == "-" for c in text) and text[0] != "-"


def _read_network(line: BootLine, text: str | None, said: bool, faults: list[str]) -> None:
    if text is None and said:
        text = _DEFAULT_NETWORK
    if text is None:
        return
    line.network = _network(text)
    if line.network is None:
        faults.append(f"voidbus.net={_shown(text)}: not <address>/<prefix>,<gateway>[,<DNS>...]")


def _network(text: str) -> NetworkSettings | None:
    interface, *others = text.split(",")
    address, _, prefix = interface.partition("/")
    if not others or not all(is_ipv4(part) for part in (address, *others)):
        return None
    if not (prefix.isascii() and prefix.isdigit() and len(prefix) <= 2 and 1 <= int(prefix) <= 32):
        return None
    return NetworkSettings(address, int(prefix), others[0], tuple(others[1:]))


def is_ipv4(text: str) -> bool:
    """Whether this is an IPv4 address in dotted decimal, without leading zeros."""
    parts = text.split(".")
    return len(parts) == 4 and all(
        part.isascii()
        and part.isdigit()
        and len(part) <= 3
        and str(int(part)) == part
        and int(part) < 256
        for part in parts
    )


def _read_roots(line: BootLine, values: dict[str, str], faults: list[str]) -> None:
    layers = []
    for name in values.get("voidbus.layers", "").split(","):
        device = _device(name)
        if device is not None:
            layers.append(device)
        elif name:
            faults.append(f"voidbus.layers: {_shown(name)} is not the name of a device")
    line.layers = tuple(layers)
    more = values.get("voidbus.more")
    if more:
        line.more = _device(more)
        if line.more is None:
            faults.append(f"voidbus.more={_shown(more)}: not the name of a device")
    device_text = values.get("voidbox.oci_rootfs_dev")
    if device_text:
        line.rootfs_device = _device(device_text)
        if line.rootfs_device is None:
            faults.append(f"voidbox.oci_rootfs_dev={_shown(device_text)}: not a device of /dev")
    path = values.get("voidbox.oci_rootfs")
    if path:
        reason = path_fault(path)
        if reason is None:
            line.rootfs_path = path
        else:
            faults.append(f"voidbox.oci_rootfs={_shown(path)}: {reason}")


def _device(text: str) -> str | None:
    name = text.removeprefix("/dev/")
    if 0 < len(name) <= 32 and all(c in _LETTERS for c in name):
        return f"/dev/{name}"
    return None


def _share(value: str) -> Share | str:
    tag, _, rest = value.partition(":")
    path, colon, mode = rest.rpartition(":")
    if not colon or mode not in ("ro", "rw"):
        path, mode = rest, "ro"
    if not tag or len(tag.encode(errors="replace")) > TAG_BYTES or "/" in tag:
        return "not <tag>:<guest path>:<ro|rw>"
    reason = path_fault(path)
    if reason is not None:
        return reason
    names = [name for name in path.split("/") if name not in ("", ".")]
    return Share(tag, "/" + "/".join(names), mode == "rw")


def path_fault(path: str) -> str | None:
    """Why nothing can be mounted at a guest path, or None."""
    names = [name for name in path.split("/") if name not in ("", ".")]
    if not path.startswith("/") or not names or ".." in names or "\0" in path:
        return "the guest path must be absolute, without '..', and not the root"
    whole = "/" + "/".join(names)
    for reserved in RESERVED:
        if (
            whole == reserved
            or whole.startswith(reserved + "/")
            or reserved.startswith(whole + "/")
        ):
            return f"the guest path is taken: {reserved} belongs to the machine"
    return None


def _shown(value: str) -> str:
    """A value for a log line: short and printable."""
    return ascii(value if len(value) <= 80 else value[:77] + "...")
