"""The official MCP SDK's server on stdio with one tool of void-mcp: it reads the inbox.

Its own HTTP client is used, and kept, as one who writes such a server would.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# By name: to the type checker `mcp` would be the folder of ours.
server: Any = importlib.import_module("mcp.server.mcpserver").MCPServer("peer")
http: Any = importlib.import_module("httpx2").AsyncClient(base_url=os.environ["VOID_SIDECAR_URL"])


async def read_peer_messages(since: int | None = None) -> str:
    """Read what other agents have sent."""
    query = "" if since is None else f"?since={since}"
    answer = await http.get(f"/v1/inbox{query}")
    return str(answer.raise_for_status().text)


if __name__ == "__main__":
    server.tool()(read_peer_messages)
    server.run(transport="stdio")
