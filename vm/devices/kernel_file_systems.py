"""File systems by which one speaks to the kernel, and that are shared with no guest.

Their files are not files: reading one may tell what another process holds (/proc/PID/environ), and
writing one may change the host. Whoever shares `/` means the disk.
"""

from __future__ import annotations

from voidbus.vm.devices.linux_calls import file_system_magic

# include/uapi/linux/magic.h, and statfs(2). devtmpfs is a tmpfs by its number; the devices on it
# are never opened.
_NAMES = {
    0x9FA0: "procfs",
    0x62656572: "sysfs",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x73636673: "securityfs",
    0x27E0EB: "a cgroup file system",
    0x63677270: "a cgroup file system",
    0x1CD1: "devpts",
    0x62656570: "configfs",
    0xDE5E81E4: "efivarfs",
    0x6165676C: "pstore",
    0xF97CFF8C: "selinuxfs",
    0x42494E4D: "binfmt_misc",
    0x6E736673: "nsfs",
    0xCAFE4A11: "a BPF file system",
    0x19800202: "mqueue",
    0x65735543: "the control file system of FUSE",
}


def kernel_file_system(descriptor: int) -> str | None:
    """The name of the kernel's file system an open file is on; None for one of files. Raises
    OSError."""
    return _NAMES.get(file_system_magic(descriptor))
