"""Real builds from the packages in the cache: for whom and when they are made makes no difference.

Each takes some twelve seconds of one core: packages are unpacked, and the guest's Python library is
compiled.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_vm import eventually

from voidbus.vm.image.build import choose_packages
from voidbus.vm.image.recipe import BASE
from voidbus.vm.image.store import default_store

pytestmark = [pytest.mark.needs("packages"), pytest.mark.timeout(600)]

BUILD_SECONDS = 240.0

USER = 54_321
"""A user who is not root, and of whom no file tells."""

# As another user it can't be begun: Python itself may lie where only its owner may go.
PROGRAM = """
import os, sys
from pathlib import Path
from voidbus.vm.image.build import build_image
from voidbus.vm.image.product import read_product
from voidbus.vm.image.store import ImageStore

read_product()  # it imports more
user = int(sys.argv[1])
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
os.umask(int(sys.argv[2], 8))
build_image(ImageStore(Path(sys.argv[3])), "base", lambda text: print(text, file=sys.stderr))
"""


class Bench:
    """A directory that anybody may enter, with programs that are found before the host's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.chmod(0o755)
        self._programs = folder / "bin"
        self._programs.mkdir()
        refusal = self._programs / "apt-get"  # everything is in the cache
        refusal.write_text("#!/bin/sh\necho nothing may be fetched here >&2\nexit 1\n")
        refusal.chmod(0o755)

    def build(self, place: str, *, user: int = 0, umask: str = "022", **environment: str) -> Path:
        """A store with an image that `user` has built in `place`, from copies of the packages."""
        home = self._folder / place
        packages = home / "store/packages"
        packages.mkdir(parents=True)
        kernel, others = choose_packages(BASE)
        for package in (kernel, *others):
            shutil.copy(default_store().packages / package.file_name, packages)
        for path in (home, *home.rglob("*")):
            os.chown(path, user, user)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(user), umask, str(home / "store")],
            cwd=home,
            env={
                **os.environ,
                "PATH": f"{self._programs}:{os.environ['PATH']}",
                "HOME": str(home),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "writing the archive" in done.stderr
        return home / "store"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="vb-build-") as folder:
        yield Bench(Path(folder))


@pytest.fixture(scope="module")
def first(bench: Bench) -> dict[str, str]:
    """What this process's own user builds."""
    store = bench.build("first", user=os.geteuid(), PYTHONHASHSEED="1", TZ="UTC")
    return published(store)


def published(store: Path) -> dict[str, str]:
    """The digests of what a build has published, by path: kernel, archives, manifests."""
    files = {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("distributions", "images")
        for path in (store / kind).glob("*/*")
        if path.is_file()
    }
    names = sorted(path.rpartition("/")[2] for path in files)
    assert names == ["base.cpio", "initramfs.cpio", "manifest.json", "manifest.json", "vmlinux"]
    return files


def test_the_same_packages_give_the_same_bytes_at_another_time_and_place(
    bench: Bench, first: dict[str, str]
) -> None:
    made = int(time.time())
    assert eventually(lambda: int(time.time()) > made, 5)  # archives count seconds
    again = bench.build(
        "a/place/further/down",
        user=os.geteuid(),
        umask="077",
        PYTHONHASHSEED="2",
        TZ="Pacific/Apia",
        SOURCE_DATE_EPOCH="7",
        LC_ALL="C",
    )
    assert published(again) == first


@pytest.mark.needs("other-user")
def test_a_user_who_is_not_root_builds_the_same_image(bench: Bench, first: dict[str, str]) -> None:
    store = bench.build("users", user=USER)
    assert published(store) == first
    assert {path.lstat().st_uid for path in store.rglob("*")} == {USER}
