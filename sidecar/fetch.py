"""Fetches a small text for a run, by HTTP, within a deadline that covers all of it."""

from __future__ import annotations

import asyncio

import aiohttp

FETCH_SECONDS = 5.0
"""How long one may take in all: a cancel waits for it."""

_CHUNK = 64 * 1024


class NotFetched(Exception):
    """Why it could not be fetched."""


def fetch_text(url: str, limit: int) -> bytes:
    """What is at `url`, an http: or https: one. Blocks for FETCH_SECONDS at most.

    Raises NotFetched: it can't be reached, is no text, has over `limit` bytes, or takes too long.
    """
    if not url.startswith(("https://", "http://")):
        raise NotFetched(f"{url} is no http: or https: address")
    try:
        content = asyncio.run(_get(url, limit))
    except TimeoutError as error:
        raise NotFetched(f"{url} did not come within {FETCH_SECONDS:g} s") from error
    except (OSError, ValueError, aiohttp.ClientError) as error:
        raise NotFetched(f"{url} can't be read: {error}") from error
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise NotFetched(f"{url} is no text in UTF-8") from error
    return content


async def _get(url: str, limit: int) -> bytes:
    """Raises NotFetched, and what aiohttp does. `total` covers a slow head as a slow body."""
    content = b""
    total = aiohttp.ClientTimeout(total=FETCH_SECONDS)
    async with (
        aiohttp.ClientSession(timeout=total, trust_env=True) as session,
        session.get(url) as answer,
    ):
        if answer.status != 200:
            raise NotFetched(f"{url} was answered with {answer.status} {answer.reason}")
        async for data in answer.content.iter_chunked(_CHUNK):
            content += data
            if len(content) > limit:
                raise NotFetched(f"{url} has over {limit} bytes")
    return content
