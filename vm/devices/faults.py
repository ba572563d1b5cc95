"""How a device breaks: what the driver, or the front end, did that it can't go on from."""

from __future__ import annotations


class DeviceError(Exception):
    """Somebody on the guest's side broke the rules so that the device can't go on. It ends the
    machine; the text is the reason, and says which rule."""


class GuestMemoryError(DeviceError):
    """An address, or a length from it, that is not guest memory; or memory that can't be mapped."""


class QueueError(DeviceError):
    """A driver broke the rules of its queue."""
