"""An answer that is put together bit by bit, of any size: in memory while it is small, else in an
unnamed file. Its length is known before it is sent, as clients want it."""

from __future__ import annotations

import asyncio
import tempfile
from types import TracebackType
from typing import Self

from aiohttp import web

_IN_MEMORY = 1024 * 1024
_CHUNK = 256 * 1024


class Spooled:
    """A context manager: what is written is gone with it."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by __exit__
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Append."""
        self._file.write(data)
        self._size += len(data)

    async def send(
        self, request: web.BaseRequest, content_type: str = "application/json"
    ) -> web.StreamResponse:
        """Send it all, as fast as the client reads."""
        self._file.seek(0)
        if self._size <= _IN_MEMORY:
            return web.Response(body=self._file.read(), content_type=content_type)
        response = web.StreamResponse()
        response.content_type = content_type
        response.content_length = self._size
        await response.prepare(request)
        if request.method != "HEAD":
            loop = asyncio.get_running_loop()
            while chunk := await loop.run_in_executor(None, self._file.read, _CHUNK):
                await response.write(chunk)
        await response.write_eof()
        return response
