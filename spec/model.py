"""The base of the models: frozen, and strict about types (a whole number is not `1.0`, `true` or
`"1"`), as the format's other readers are."""

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")

# A sequence that doesn't change. A list will do for a tuple, also inside a union's member, where
# pydantic's strict mode wants a tuple; the items are as strict as ever.
Items = Annotated[tuple[Item, ...], Field(strict=False)]


PathText = Annotated[Path, Field(strict=False)]
"""A path, written as text."""


class SpecModel(BaseModel):
    """Part of a run specification. Fields it doesn't know are ignored here; the loader warns."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", populate_by_name=True, hide_input_in_errors=True
    )


class ConfigModel(BaseModel):
    """Part of the supervisor's configuration. Fields it doesn't know are errors."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True
    )
