"""Skills: what an agent is given beside its prompt, in the four forms they are written in."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from voidbus.spec.model import Items, SpecModel

SkillType = Literal["agent", "file", "remote", "cli", "mcp"]
SKILL_TYPES: tuple[str, ...] = get_args(SkillType)


class ReferenceSkill(SpecModel):
    """A skill written `type:value`, such as `file:skills/review.md` or `agent:claude-code`."""

    type: SkillType
    value: str

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        kind, colon, value = data.partition(":")
        if not colon:
            raise PydanticCustomError(
                "skill",
                "invalid skill '{skill}', expected '<type>:<value>'",
                {"skill": _short(data)},
            )
        if kind not in SKILL_TYPES:
            raise PydanticCustomError(
                "skill_type",
                "unsupported skill type '{kind}'",
                {"kind": _short(kind), "allowed": SKILL_TYPES},
            )
        return {"type": kind, "value": value}

    @model_serializer
    def _joined(self) -> str:
        return f"{self.type}:{self.value}"


class OciSkill(SpecModel):
    """Tools from an OCI image, mounted in the guest."""

    image: str
    mount: str
    # `readonly` and not `read_only`: the format's spelling.
    readonly: bool = True


class McpSkill(SpecModel):
    """An MCP server started in the guest."""

    command: str
    args: Items[str] = ()
    env: Mapping[str, str] = Field(default_factory=dict)


class InlineSkill(SpecModel):
    """A skill's markdown, given in place."""

    name: str
    content: str


# The order in which an object is tried (none of the forms names itself).
OBJECT_FORMS: tuple[tuple[str, type[SpecModel]], ...] = (
    ("<oci>", OciSkill),
    ("<mcp>", McpSkill),
    ("<inline>", InlineSkill),
)


def form_of(fields: frozenset[str]) -> str:
    """The form of a skill written as an object with these fields: the first whose required fields
    are all there, else the one with most fields in common."""

    def required(model: type[SpecModel]) -> frozenset[str]:
        return frozenset(name for name, field in model.model_fields.items() if field.is_required())

    for tag, model in OBJECT_FORMS:
        if required(model) <= fields:
            return tag
    # max() keeps the first of equals, so the order above decides.
    return max(OBJECT_FORMS, key=lambda form: len(fields & form[1].model_fields.keys()))[0]


def _form(data: Any) -> str:
    if isinstance(data, SpecModel):
        return next((tag for tag, model in OBJECT_FORMS if isinstance(data, model)), "<reference>")
    if isinstance(data, Mapping):
        return form_of(frozenset(str(key) for key in data))
    return "<reference>"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


# Tags are in angle brackets so that they can't be taken for a field's name in an error's location.
Skill = Annotated[
    Annotated[ReferenceSkill, Tag("<reference>")]
    | Annotated[OciSkill, Tag("<oci>")]
    | Annotated[McpSkill, Tag("<mcp>")]
    | Annotated[InlineSkill, Tag("<inline>")],
    Discriminator(_form),
]
