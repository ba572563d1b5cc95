"""Machines that are a QEMU process."""
