"""Kernel modules: which ones a list of names comes to, and the index a guest loads them by."""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from voidbus.vm.image.elf import Elf, ElfError
from voidbus.vm.image.fault import ImageError


@dataclass(frozen=True, slots=True)
class Module:
    """A module's content, uncompressed. `path` is relative to its release's directory, `needs`
    the names of the modules it can't be loaded without."""

    name: str
    path: str
    content: bytes
    needs: tuple[str, ...]


def module_name(text: str) -> str:
    """A module's name as the kernel has it: `-` and `_` are the same."""
    return text.replace("-", "_")


def built_in_modules(folder: Path) -> set[str]:
    """The names of what a kernel has in it, and needs no file for. `folder` is as in
    `load_order`."""
    return {
        module_name(line.rpartition("/")[2].partition(".ko")[0])
        for line in (folder / "modules.builtin").read_text().splitlines()
    }


def load_order(folder: Path, wanted: Iterable[str]) -> list[Module]:
    """The wanted modules and all they need, each after what it needs.

    `folder` is `lib/modules/RELEASE`. Names that are built in are left out. Raises ImageError
    naming the modules that are neither there nor built in.
    """
    found = {module_name(path.name.partition(".ko")[0]): path for path in folder.rglob("*.ko*")}
    built_in = built_in_modules(folder)
    missing: list[str] = []
    ordered: dict[str, Module] = {}

    def take(name: str, above: tuple[str, ...]) -> None:
        if name in ordered or name in built_in:
            return
        if name in above:
            raise ImageError(f"kernel modules need each other: {' > '.join((*above, name))}")
        if name not in found:
            missing.append(name)
            return
        module = _read(found[name], folder)
        for need in module.needs:
            take(need, (*above, name))
        ordered[name] = module

    for name in wanted:
        take(module_name(name), ())
    if missing:
        raise ImageError(
            f"the kernel in {folder.name} lacks the modules {', '.join(sorted(set(missing)))}; "
            "guests can't do without them: use the kernel of linux-image-cloud-amd64"
        )
    return list(ordered.values())


def _read(path: Path, folder: Path) -> Module:
    content = path.read_bytes()
    relative = path.relative_to(folder).as_posix()
    if path.suffix == ".xz":
        try:
            content = lzma.decompress(content)
        except lzma.LZMAError as error:
            raise ImageError(f"kernel module {relative}: {error}") from error
        relative = relative.removesuffix(".xz")
    elif path.suffix != ".ko":
        raise ImageError(f"kernel module {relative} is compressed in a way not known here")
    try:
        information = Elf(content).section(".modinfo")
    except ElfError as error:
        raise ImageError(f"kernel module {relative}: {error}") from error
    needs: tuple[str, ...] = ()
    for field in information.split(b"\0"):
        key, _, value = field.partition(b"=")
        if key == b"depends" and value:
            needs = tuple(module_name(name) for name in value.decode("ascii", "replace").split(","))
    return Module(module_name(path.name.partition(".ko")[0]), relative, content, needs)


def modules_dep(modules: Iterable[Module]) -> str:
    """The text of `modules.dep` as depmod(8) writes it: `PATH: NEEDED...`, what is needed listed
    so that loading it from the last to the first works. `modules` come in load order."""
    order = {module.name: module for module in modules}
    last_first = list(reversed(order))
    lines = []
    for module in order.values():
        needed = _all_needed(module, order)
        paths = [order[name].path for name in last_first if name in needed]
        lines.append(f"{module.path}:{''.join(' ' + path for path in paths)}\n")
    return "".join(lines)


def _all_needed(module: Module, order: dict[str, Module]) -> set[str]:
    needed: set[str] = set()
    rest = [name for name in module.needs if name in order]
    while rest:
        name = rest.pop()
        if name not in needed:
            needed.add(name)
            rest += [each for each in order[name].needs if each in order]
    return needed
