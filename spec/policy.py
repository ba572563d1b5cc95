"""The limits a caller may set on a run."""

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from voidbus.spec.model import SpecModel

U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1


def _at_least_one_machine(value: int) -> int:
    if value < 1:
        raise PydanticCustomError("policy", "max_parallel_microvms_per_run must be >= 1")
    return value


def _some_time(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("policy", "stage_timeout_secs must be > 0")
    return value


class Policy(SpecModel):
    """Limits of one run. A run without a policy has none: the defaults are for fields left out of
    a policy that was given.

    Raises pydantic.ValidationError: errors of type `policy` carry the API's INVALID_POLICY
    messages; any other type (a negative or fractional number) is an invalid request.
    """

    max_parallel_microvms_per_run: Annotated[
        int, Field(ge=0, le=U32_MAX), AfterValidator(_at_least_one_machine)
    ] = 4
    max_stage_retries: Annotated[int, Field(ge=0, le=U32_MAX)] = 3
    stage_timeout_secs: Annotated[int, Field(ge=0, le=U64_MAX), AfterValidator(_some_time)] = 3600
    cancel_grace_period_secs: Annotated[int, Field(ge=0, le=U64_MAX)] = 30
