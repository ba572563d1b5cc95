"""Virtio devices and the guest memory they work on. No I/O but on descriptors they are handed."""
