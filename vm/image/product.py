"""The part of an image that is voidbus's own: the guest agent, the guest's tools, the files they
count on. It is small and made anew in an instant, so a change of it costs no build."""

from __future__ import annotations

import hashlib
import io
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from voidbus.vm.image import cpio, tree
from voidbus.vm.image.bytecode import compile_folder
from voidbus.vm.image.recipe import PYTHON

HOME = "usr/lib/voidbus"
"""Where the product's files are in the guest."""

TOOLS_FOLDER = "usr/local/bin"

_PACKAGE = Path(__file__).resolve().parents[2]

# What of each folder goes into a guest; None is every source there is.
FOLDERS: dict[str, tuple[Path, tuple[str, ...] | None]] = {
    "guest": (_PACKAGE / "vm/guest", None),
    "sidecar": (_PACKAGE / "sidecar", ("__init__.py", "client.py", "void_message.py")),
    "mcp": (_PACKAGE / "mcp", None),
}

INIT = f"""#!/usr/bin/{PYTHON} -IS
import sys

sys.path.append("/{HOME}")
from guest.init import main

sys.exit(main())
"""

# A program's folder and module; imported, so that its byte code is used.
TOOLS = {
    "claudio": ("guest", "claudio"),
    "claude-code": ("guest", "claudio"),
    "void-message": ("sidecar", "void_message"),
    "void-mcp": ("mcp", "void_mcp"),
}

_TOOL = """#!/usr/bin/python3 -EsS
import sys

sys.path[:1] = ["/{home}/{folder}", "/{home}/sidecar"]
from {module} import main

sys.exit(main())
"""

SANDBOX_ID = 1000
"""User and group the agent's programs run as."""

_TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    f"sandbox:x:{SANDBOX_ID}:{SANDBOX_ID}:sandbox:/home/sandbox:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": f"root:x:0:\ntty:x:5:\nsandbox:x:{SANDBOX_ID}:\nnogroup:x:65534:\n",
    "etc/shadow": "root:*:::::::\nsandbox:*:::::::\nnobody:*:::::::\n",
    "etc/hostname": "voidbus\n",
    "etc/hosts": "127.0.0.1\tlocalhost voidbus\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"
    "services: files\nprotocols: files\n",
    "etc/resolv.conf": "",
    "etc/shells": "/bin/sh\n/bin/bash\n",
    "etc/profile": "export PATH=${PATH:-/usr/local/bin:/usr/bin:/bin}\n",
    "etc/os-release": 'NAME="voidbus guest"\nID=voidbus\nID_LIKE=debian\n'
    'PRETTY_NAME="voidbus guest (Debian 12 packages)"\n',
}

_DIRECTORIES = (
    *("dev", "etc", "home", "mnt", "opt", "proc", "run", "srv", "sys", "usr", "usr/lib"),
    *("usr/local", "usr/local/bin", "usr/local/sbin", "var", "var/log", "etc/voidbox", HOME),
)


RELEASE = version("voidbus")
"""Read at import, which run processes share: it takes a parser of mail, and 0.4 MB."""


@dataclass(frozen=True, slots=True)
class Product:
    """The product's sources, as they are now, and voidbus's version. `digest` names them and
    this file."""

    digest: str
    sources: tuple[tuple[str, bytes], ...]
    version: str

    @property
    def tools(self) -> tuple[str, ...]:
        """The tools a guest gets: those whose file is there."""
        have = {path for path, _ in self.sources}
        return tuple(
            name for name, (folder, module) in TOOLS.items() if f"{folder}/{module}.py" in have
        )


def read_product(folders: dict[str, tuple[Path, tuple[str, ...] | None]] = FOLDERS) -> Product:
    """The sources a guest gets. Raises OSError where they can't be read."""
    sources = []
    for folder, (place, chosen) in sorted(folders.items()):
        if not place.is_dir():
            continue
        names = chosen or tuple(path.name for path in place.glob("*.py"))
        sources += [(f"{folder}/{name}", (place / name).read_bytes()) for name in sorted(names)]
    seal = hashlib.sha256()
    # This file too: what it adds of its own is part of the product. And the version: an image's
    # manifest names it.
    own = (("product", Path(__file__).read_bytes()), ("version", RELEASE.encode()))
    for path, content in (*sources, *own):
        seal.update(f"{path}\0{len(content)}\0".encode() + content)
    return Product(seal.hexdigest(), tuple(sources), RELEASE)


def product_archive(product: Product, root: Path, scratch: Path) -> bytes:
    """The product part as an archive. `root` has the guest's Python, `scratch` is for temporary
    files. Raises ImageError and OSError."""
    with tempfile.TemporaryDirectory(prefix=".product-", dir=scratch) as work:
        folder = Path(work)
        for path, content in product.sources:
            target = folder / path
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
        compile_folder(root, folder, f"/{HOME}", keep_sources=True)
        entries = [_below(HOME, entry) for entry in tree.entries(folder)]
        entries += _fixed_entries(product.tools)
        stream = io.BytesIO()
        cpio.write_archive(entries, stream)
    return stream.getvalue()


def _below(prefix: str, entry: cpio.Entry) -> cpio.Entry:
    return cpio.Entry(f"{prefix}/{entry.path}", entry.mode, entry.content)


def _fixed_entries(tools: tuple[str, ...]) -> list[cpio.Entry]:
    """Everything that is the same whatever the sources are."""
    found = [cpio.directory(path) for path in _DIRECTORIES]
    found += [
        # The kernel makes the root writable for everybody.
        cpio.directory("."),
        cpio.directory("root", 0o700),
        cpio.directory("tmp", 0o1777),
        cpio.directory("var/tmp", 0o1777),
        cpio.directory("home/sandbox", 0o755, SANDBOX_ID, SANDBOX_ID),
        cpio.directory("workspace", 0o755, SANDBOX_ID, SANDBOX_ID),
        # The kernel opens the console for init before anything is mounted.
        cpio.character_device("dev/console", 5, 1),
        cpio.character_device("dev/null", 1, 3, 0o666),
        cpio.symlink("var/run", "/run"),
        cpio.regular("init", INIT.encode(), 0o755),
    ]
    for path, text in _TEXTS.items():
        found.append(cpio.regular(path, text.encode(), 0o600 if path == "etc/shadow" else 0o644))
    for tool in tools:
        folder, module = TOOLS[tool]
        text = _TOOL.format(home=HOME, folder=folder, module=module)
        found.append(cpio.regular(f"{TOOLS_FOLDER}/{tool}", text.encode(), 0o755))
    return found
