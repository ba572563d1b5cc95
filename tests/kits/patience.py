"""How much longer than on a usual machine everything may take here."""

from __future__ import annotations

import os

SLOW = float(os.environ.get("VOIDBUS_SLOW", "1"))
"""A factor for the kits' time limits. `scripts/lab` sets it: its processor is emulated."""
