"""voidbus's own files for guests, read once: as they are when a process begins, or the zygote that
it is of. They belong to the code that runs, whatever is installed over them meanwhile.
"""

from __future__ import annotations

import contextlib
from functools import cache

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.product import Product, read_product


@cache
def own_files() -> Product:
    """Raises ImageError where they can't be read."""
    try:
        return read_product()
    except OSError as error:
        raise ImageError(f"voidbus's own files can't be read: {error}; install it again") from error


# Here and not when they are asked for: so run processes share them. Each that read them itself
# would have 0.5 MB more of its own.
with contextlib.suppress(ImageError):
    own_files()
