"""What goes wrong with guest images."""

from __future__ import annotations


class ImageError(Exception):
    """An image can't be built, found, trusted or used. The text says what to do about it."""
