"""Starts the agent from its folder alone: ``python -I -S <this folder> --control-fd N``.

A guest has no installed packages, so the folder is made importable under its own name; it
goes last on the path, so that nothing beside it can take the place of the standard library.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if entry != str(folder)]
sys.path.append(str(folder.parent))
sys.exit(importlib.import_module(f"{folder.name}.warden").main(sys.argv[1:]))
