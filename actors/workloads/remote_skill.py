"""Where the skills of repositories are."""

from __future__ import annotations

from collections.abc import Mapping

REMOTE_SKILLS = "https://raw.githubusercontent.com"
"""The place `remote:` skills are of (the format's own)."""

PLACE_VARIABLE = "VOIDBUS_REMOTE_SKILLS"
"""The supervisor's variable that names another place, as a mirror."""


def remote_skill_url(value: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The name and the address of a skill `OWNER/REPOSITORY[/SKILL]`."""
    owner, _, rest = value.partition("/")
    repository, _, skill = rest.partition("/")
    where = f"skills/{skill}/SKILL.md" if skill else "SKILL.md"
    place = environ.get(PLACE_VARIABLE) or REMOTE_SKILLS
    name = skill.rpartition("/")[2] or repository or owner
    return name, f"{place.rstrip('/')}/{owner}/{repository}/main/{where}"
