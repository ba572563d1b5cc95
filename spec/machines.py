"""How the supervisor's configuration has machines made."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from voidbus.spec.model import ConfigModel, PathText


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise PydanticCustomError("path", "it must be an absolute path")
    return path


class MachinesConfig(ConfigModel):
    """What machines of KVM are given in place of our own devices.

    `kernel_vsock`: they reach the host through `/dev/vhost-vsock`, which is faster, but then a
    guest also reaches whatever else listens on AF_VSOCK on the host. `virtiofsd`: the program that
    serves them directories of the host.
    """

    kernel_vsock: bool = False
    virtiofsd: Annotated[PathText, AfterValidator(_absolute)] | None = None
