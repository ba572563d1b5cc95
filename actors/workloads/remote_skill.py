"""Where the skills of repositories are, and how one is fetched."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException

REMOTE_SKILLS = "https://raw.githubusercontent.com"
"""The place `remote:` skills are of (the format's own)."""

PLACE_VARIABLE = "VOIDBUS_REMOTE_SKILLS"
"""The supervisor's variable that names another place, as a mirror."""

FETCH_SECONDS = 5.0
"""How long one may take: a cancel waits for it."""

_CHUNK = 64 * 1024


class NotFetched(Exception):
    """Why a skill could not be fetched."""


def remote_skill_url(value: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The name and the address of a skill `OWNER/REPOSITORY[/SKILL]`."""
    owner, _, rest = value.partition("/")
    repository, _, skill = rest.partition("/")
    where = f"skills/{skill}/SKILL.md" if skill else "SKILL.md"
    place = environ.get(PLACE_VARIABLE) or REMOTE_SKILLS
    name = skill.rpartition("/")[2] or repository or owner
    return name, f"{place.rstrip('/')}/{owner}/{repository}/main/{where}"


def fetch_skill(url: str, limit: int) -> bytes:
    """What is at `url`, an http: or https: one. Blocks for FETCH_SECONDS at most.

    Raises NotFetched: it can't be reached, is no text, has over `limit` bytes, or takes too long.
    """
    if not url.startswith(("https://", "http://")):
        raise NotFetched(f"{url} is no http: or https: address")
    deadline = time.monotonic() + FETCH_SECONDS
    content = b""
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as answer:  # noqa: S310 - see above
            while data := answer.read1(_CHUNK):
                content += data
                if len(content) > limit:
                    raise NotFetched(f"{url} has over {limit} bytes")
                if time.monotonic() > deadline:
                    raise NotFetched(f"{url} did not come within {FETCH_SECONDS:g} s")
    except urllib.error.HTTPError as error:
        error.close()
        raise NotFetched(f"{url} was answered with {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise NotFetched(f"{url} can't be read: {error}") from error
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise NotFetched(f"{url} is no text in UTF-8") from error
    return content
