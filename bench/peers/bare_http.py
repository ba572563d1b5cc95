"""The floor of HTTP: an aiohttp handler with one small answer. `bare_http.py SOCKET`."""

from __future__ import annotations

import sys

from aiohttp import web


async def health(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok", "persistence": "disk"})


def main() -> None:
    app = web.Application()
    app.router.add_get("/v1/health", health)
    web.run_app(app, path=sys.argv[1], access_log=None, print=None)


if __name__ == "__main__":
    main()
