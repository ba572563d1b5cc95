"""scripts/setup: what it installs, and when it does nothing. apt, Python and pip are stand-ins."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_PROGRAMS = ("bash", "cat", "chmod", "cut", "dirname", "mkdir", "rm", "sha256sum")
# Each writes into the log what it was asked for.
_APT = """
echo "apt-get $*" >> "$LOG"
case " $* " in *" python3 "*) mv "$STORE/python3" "$BIN/python3" ;; esac
"""
# `-m venv --clear .venv` makes one, in which python is the same again.
_PYTHON = """
case "$*" in
    --version) echo "Python 3.13.0" ;;
    -m*) echo "python $*" >> "$LOG" ;;
esac
case "$*" in
    "-m venv"*)
        mkdir -p .venv/bin
        cat "$0" > .venv/bin/python
        chmod +x .venv/bin/python
        ;;
esac
"""


@dataclass
class Machine:
    """A checkout on a machine that has nothing but what is in `bin`."""

    checkout: Path
    bin: Path
    log: Path

    def program(self, name: str, script: str, folder: Path | None = None) -> None:
        path = (folder or self.bin) / name
        path.write_text(f"#!{self.bin}/bash\n{script}\n")
        path.chmod(0o755)

    def setup(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.checkout / "scripts" / "setup"],
            env={
                "PATH": str(self.bin),
                "LOG": str(self.log),
                "BIN": str(self.bin),
                "STORE": str(self.checkout.parent),
            },
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    def asked(self) -> list[str]:
        """What was asked of apt, Python and pip since this was called last."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def files(self) -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_size)
            for path in sorted(self.checkout.rglob("*"))
        }


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Root's, with Debian's tools and without Python."""
    made = Machine(tmp_path / "checkout", tmp_path / "bin", tmp_path / "log")
    (made.checkout / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", made.checkout)
    setup = made.checkout / "scripts/setup"
    shutil.copy(ROOT / "scripts/setup", setup)
    setup.write_text(setup.read_text().replace("/usr/sbin/", f"{made.bin}/"))
    made.bin.mkdir()
    for name in (*_PROGRAMS, "mv"):
        found = shutil.which(name)
        assert found is not None, name
        (made.bin / name).symlink_to(found)
    for name in ("qemu-system-x86_64", "depmod", "mksquashfs", "passt", "socat", "cpio"):
        made.program(name, "")
    made.program("uname", "echo x86_64")
    made.program("id", "echo 0")
    made.program("apt-get", _APT)
    made.program("python3", _PYTHON, folder=tmp_path)
    return made


def test_root_without_python_has_it_installed_and_the_environment_made(machine: Machine) -> None:
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    asked = machine.asked()
    assert asked[:2] == [
        "apt-get update -q",
        "apt-get install -y -q --no-install-recommends python3 python3-venv",
    ]
    assert asked[2] == "python -m venv --clear .venv"
    assert asked[-1].endswith("--editable .[test]")


def test_who_is_not_root_is_told_the_command_and_nothing_is_installed(machine: Machine) -> None:
    machine.program("id", "echo 1000")
    done = machine.setup()
    assert done.returncode == 1
    assert "sudo apt-get install python3 python3-venv" in done.stderr
    assert machine.asked() == []


def test_root_is_told_the_command_where_what_is_installed_is_too_old(machine: Machine) -> None:
    machine.program("python3", "exit 1", folder=machine.checkout.parent)
    done = machine.setup()
    assert done.returncode == 1
    assert "no Python 3.11 or later" in done.stderr


def test_what_machines_need_is_installed_for_root_and_named_for_others(machine: Machine) -> None:
    (machine.bin / "passt").unlink()
    machine.setup()
    assert "apt-get install -y -q --no-install-recommends passt" in machine.asked()
    machine.program("id", "echo 1000")
    done = machine.setup()
    assert done.returncode == 0
    assert "sudo apt-get install --no-install-recommends passt" in done.stderr
    assert machine.asked() == []


def test_a_second_setup_changes_nothing_and_asks_nothing_of_pip(machine: Machine) -> None:
    machine.setup()
    machine.asked()
    before = machine.files()
    done = machine.setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine.asked() == []
    assert machine.files() == before


@pytest.mark.parametrize("change", ["pyproject.toml", "scripts/setup", "no stamp", "moved"])
def test_the_stamp_decides_whether_anything_is_done(machine: Machine, change: str) -> None:
    machine.setup()
    machine.asked()
    if change == "no stamp":
        (machine.checkout / ".venv/.voidbus-stamp").unlink()
    elif change == "moved":
        machine.checkout = machine.checkout.rename(machine.checkout.with_name("elsewhere"))
    else:
        with (machine.checkout / change).open("a") as file:
            file.write("# changed\n")
    assert machine.setup().returncode == 0
    assert [line for line in machine.asked() if "--editable" in line]
    assert machine.setup().returncode == 0
    assert machine.asked() == []
