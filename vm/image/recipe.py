"""What the `base` image is made of: packages, what is taken of them, kernel modules, programs."""

from __future__ import annotations

from dataclasses import dataclass

REVISION = 1
"""Part of what a distribution part is known by: raise it when this file or the code that carries
it out makes another tree of the same packages."""

PYTHON = "python3.11"
LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The distribution part of an image.

    `kernel` is a package that depends on the kernel's own. `packages` are taken whole but for
    paths that match `dropped` (patterns of fnmatch, over the path in the guest); with `only`, a
    package is taken no further than its patterns.
    """

    name: str
    kernel: str
    packages: tuple[str, ...]
    only: dict[str, tuple[str, ...]]
    dropped: tuple[str, ...]
    modules: tuple[str, ...]
    programs: tuple[str, ...]


_LIB = f"usr/lib/{PYTHON}"

BASE = Recipe(
    name="base",
    kernel="linux-image-cloud-amd64",
    packages=(
        "bash",
        "busybox-static",
        "ca-certificates",
        "libbz2-1.0",
        "libc6",
        "libexpat1",
        "libffi8",
        "libgcc-s1",
        "liblzma5",
        "libpython3.11-minimal",
        "libpython3.11-stdlib",
        "libsqlite3-0",
        "libssl3",
        "libtinfo6",
        "libuuid1",
        "ncurses-base",
        "python3.11-minimal",
        "zlib1g",
    ),
    only={
        "bash": ("usr/bin/bash",),
        "busybox-static": ("usr/bin/busybox",),
        "ca-certificates": ("usr/share/ca-certificates/mozilla/*",),
        # Since glibc 2.34 the rest is in libc.so.6; these names are what older programs ask for.
        "libc6": (
            "usr/lib64/*",
            *(
                f"{LIBRARIES}/{name}"
                for name in (
                    *("ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6"),
                    *("libnss_dns.so.2", "libnss_files.so.2", "libpthread.so.0"),
                    *("libresolv.so.2", "librt.so.1", "libutil.so.1"),
                )
            ),
        ),
        "libexpat1": (f"{LIBRARIES}/libexpat.so.*",),
        "libssl3": (f"{LIBRARIES}/lib*.so.3",),
        "libtinfo6": (f"{LIBRARIES}/libtinfo.so.6*",),
        "ncurses-base": tuple(
            f"usr/lib/terminfo/{name}"
            for name in ("d/dumb", "l/linux", "s/screen*", "t/tmux*", "v/vt100", "x/xterm*")
        ),
        "python3.11-minimal": (f"usr/bin/{PYTHON}",),
    },
    dropped=(
        "etc/*",
        "usr/share/bug/*",
        "usr/share/doc/*",
        "usr/share/gcc/*",
        "usr/share/gdb/*",
        "usr/share/lintian/*",
        "usr/share/man/*",
        "usr/share/menu/*",
        "usr/share/python3/*",
        # The standard library without its tests, its editor and what needs libraries not here.
        f"{_LIB}/test/*",
        f"{_LIB}/pydoc_data/*",
        f"{_LIB}/curses/*",
        f"{_LIB}/msilib/*",
        f"{_LIB}/ensurepip/*",
        f"{_LIB}/venv/*",
        f"{_LIB}/lib2to3/*",
        f"{_LIB}/distutils/*",
        f"{_LIB}/turtle.py",
        f"{_LIB}/_pydecimal.py",
        f"{_LIB}/_pyio.py",
        f"{_LIB}/sitecustomize.py",
        f"{_LIB}/*/idle_test/*",
        f"{_LIB}/sqlite3/test/*",
        f"{_LIB}/__phello__*",
        f"{_LIB}/LICENSE.txt",
        *(
            f"{_LIB}/lib-dynload/{name}.*"
            for name in (
                *("_crypt", "_ctypes_test", "_curses", "_curses_panel", "_dbm", "_testbuffer"),
                *("_testcapi", "_testclinic", "_testimportmultiple", "_testinternalcapi"),
                *("_testmultiphase", "_xxsubinterpreters", "_xxtestfuzz", "nis", "ossaudiodev"),
                *("readline", "xxlimited", "xxlimited_35"),
            )
        ),
    ),
    modules=(
        *("virtio", "virtio_ring", "virtio_mmio", "virtio_pci", "virtio_pci_modern_dev"),
        *("virtio_pci_legacy_dev", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng"),
        *("vsock", "vmw_vsock_virtio_transport", "fuse", "virtiofs", "overlay", "squashfs"),
        *("erofs", "ext4", "qemu_fw_cfg", "af_packet", "loop"),
    ),
    programs=(
        *("/bin/sh", "/bin/bash", "/bin/busybox", "/usr/bin/env", "/usr/bin/python3"),
        *("/bin/cat", "/bin/cp", "/bin/ls", "/bin/mkdir", "/bin/mount", "/bin/rm", "/bin/tar"),
        *("/sbin/ip", "/sbin/modprobe", "/usr/bin/awk", "/usr/bin/find", "/usr/bin/head"),
        *("/usr/bin/sort", "/usr/bin/timeout", "/usr/bin/wget", "/usr/bin/xargs"),
    ),
)

RECIPES = {recipe.name: recipe for recipe in (BASE,)}
