"""`scripts/test` says why there is no guest image, and then lets no test be skipped for that."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/test"

ALWAYS = ("bash", "dirname", "uname")
MACHINES = ("qemu-system-x86_64", "setpriv")
PACKAGES = ("apt-get", "apt-cache", "dpkg-deb")
REST = ("passt", "mksquashfs", "socat", "cpio")

# Builds an image, or fails to; as pytest it tells what is required of it.
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && exit "${KVM_WORKS:-1}"
if [ "$3" = image ]; then
    [ -e built ] && exit
    echo 'voidbus: error: apt knows no package bash' >&2
    exit 1
fi
echo "$* requires ${VOIDBUS_REQUIRE-nothing}"
"""


class Checkout:
    """A checkout with the script, on a host that has these programs and no others."""

    def __init__(self, root: Path, *programs: str) -> None:
        self._root = root
        for folder in ("scripts", ".venv/bin", "bin"):
            (root / folder).mkdir(parents=True)
        shutil.copy(SCRIPT, root / "scripts/test")
        self._write("scripts/setup", "#!/usr/bin/env bash\n")
        self._write(".venv/bin/python", PYTHON)
        for name in programs:
            self._write(f"bin/{name}", "#!/usr/bin/env bash\n")
        for name in ALWAYS:
            found = shutil.which(name)
            assert found is not None
            (root / "bin" / name).symlink_to(found)
        self._write("bin/uname", "#!/usr/bin/env bash\necho x86_64\n")

    def _write(self, path: str, text: str) -> None:
        place = self._root / path
        place.unlink(missing_ok=True)
        place.write_text(text)
        place.chmod(0o755)

    def built(self) -> Checkout:
        """From now on the image can be built."""
        (self._root / "built").touch()
        return self

    def test(self, **environment: str) -> tuple[str, str]:
        """What pytest was told to require, and what the script said on standard error."""
        done = subprocess.run(
            [str(self._root / "scripts/test"), "-k", "mailbox"],
            env={"PATH": str(self._root / "bin"), **environment},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        called, _, required = done.stdout.rstrip("\n").partition(" requires ")
        assert called == "-m pytest -k mailbox"
        return required, done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path, *MACHINES, *PACKAGES, *REST)


def test_a_build_that_fails_is_told_and_its_tests_must_not_be_skipped(checkout: Checkout) -> None:
    required, said = checkout.test()
    assert "voidbus: error: apt knows no package bash" in said
    assert "test: the guest image was not built (see above)" in said
    assert required == "qemu,image,vm,passt,squashfs,socat,cpio"


def test_a_build_that_goes_well_leaves_its_packages_to_build_again(checkout: Checkout) -> None:
    required, said = checkout.built().test()
    assert "not built" not in said
    assert required == "qemu,image,vm,passt,squashfs,socat,cpio,packages"


def test_where_kvm_works_its_tests_must_not_be_skipped(checkout: Checkout) -> None:
    assert checkout.test(KVM_WORKS="0")[0] == "qemu,image,vm,passt,squashfs,socat,cpio,kvm-hardware"


@pytest.mark.parametrize("wanted", ["", "root", "all"])
def test_what_the_caller_requires_stands(checkout: Checkout, wanted: str) -> None:
    required, said = checkout.test(VOIDBUS_REQUIRE=wanted)
    assert required == wanted
    assert f"test: required: {wanted or 'nothing, what this machine lacks is skipped'}\n" in said


@pytest.mark.parametrize(
    ("programs", "required"),
    [((), ""), (MACHINES, "qemu"), (PACKAGES, ""), (("passt", "socat"), "passt,socat")],
)
def test_a_machine_that_lacks_the_programs_skips(
    tmp_path: Path, programs: tuple[str, ...], required: str
) -> None:
    assert Checkout(tmp_path, *programs).test()[0] == required
