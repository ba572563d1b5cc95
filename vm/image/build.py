"""Building the distribution part of an image: the slow part, made of packages."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from voidbus.vm.image import cpio, tree
from voidbus.vm.image.agent_layers import AGENTS
from voidbus.vm.image.bytecode import compile_folder
from voidbus.vm.image.elf import Elf
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.kernel import extract_vmlinux
from voidbus.vm.image.kernel_modules import built_in_modules, load_order, module_name, modules_dep
from voidbus.vm.image.manifest import Manifest, Part
from voidbus.vm.image.packages import Package, download, resolve, unpack
from voidbus.vm.image.recipe import PYTHON, RECIPES, REVISION, Recipe
from voidbus.vm.image.store import GuestImage, ImageStore

Report = Callable[[str], None]


def build_image(store: ImageStore, name: str, report: Report) -> GuestImage:
    """Builds the image `name` from the packages apt has now, and makes it current.

    What is there already is not made again. `report` is told each step. Raises ImageError.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        names = ", ".join(sorted((*RECIPES, *AGENTS)))
        raise ImageError(f"there is no image {name!r}; there is {names}")
    report("asking apt for versions")
    kernel, packages = choose_packages(recipe)
    key = distribution_key((kernel, *packages))
    if not store.has_distribution(key):
        files = download((kernel, *packages), store.packages, report)
        with store.new_distribution(key) as folder:
            if folder is not None:
                make_distribution(recipe, kernel, packages, files, folder, report)
    store.set_current(name, key)
    report("adding voidbus's own files")
    return store.current(name)


def choose_packages(recipe: Recipe) -> tuple[Package, list[Package]]:
    """The kernel's package and the others, in the versions apt has. Raises ImageError."""
    meta, *packages = resolve([recipe.kernel, *recipe.packages])
    kernels = [name for name in meta.depends if name.startswith("linux-image-")]
    if not kernels:
        raise ImageError(f"the package {recipe.kernel} {meta.version} depends on no kernel")
    return resolve(kernels[:1])[0], packages


def distribution_key(packages: tuple[Package, ...]) -> str:
    """What a distribution part is known by: its packages' digests and the recipe's revision."""
    lines = [f"revision {REVISION}", *sorted(f"{p.name} {p.sha256}" for p in packages)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def make_distribution(
    recipe: Recipe,
    kernel: Package,
    packages: list[Package],
    files: dict[str, Path],
    folder: Path,
    report: Report,
) -> None:
    """Makes `vmlinux`, `base.cpio`, `root/` and `manifest.json` in the empty `folder`."""
    parts = []
    root = folder / "root"
    root.mkdir()
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=folder) as work:
        report("unpacking the kernel")
        unpacked = Path(work) / "kernel"
        unpack(files[kernel.name], unpacked)
        taken = _take_kernel(unpacked, root, folder, recipe)
        parts.append(Part(kernel.name, kernel.version, kernel.sha256, taken.size))
        shutil.rmtree(unpacked)
        report("unpacking packages")
        for package in packages:
            unpacked = Path(work) / "package"
            unpack(files[package.name], unpacked)
            size = tree.take(package.name, unpacked, root, recipe)
            parts.append(Part(package.name, package.version, package.sha256, size))
            shutil.rmtree(unpacked)
    tree.finish(root)
    report("compiling the guest's Python library")
    library = root / "usr/lib" / PYTHON
    compile_folder(root, library, f"/usr/lib/{PYTHON}", keep_sources=False)
    report("writing the archive")
    with (folder / "base.cpio").open("wb") as stream:
        cpio.write_archive(tree.entries(root), stream)
    manifest = Manifest(
        name=recipe.name,
        kernel_release=taken.release,
        kernel_bytes=Elf((folder / "vmlinux").read_bytes()).loaded_bytes(),
        unpacked_bytes=tree.memory_bytes(root),
        parts=tuple(parts),
        programs=recipe.programs,
        modules=taken.modules,
        built_in=taken.built_in,
    )
    (folder / "manifest.json").write_text(manifest.to_json())


class _Taken(NamedTuple):
    """What was taken of a kernel's package; `size` in bytes, modules by name."""

    release: str
    size: int
    modules: tuple[str, ...]
    built_in: tuple[str, ...]


def _take_kernel(unpacked: Path, root: Path, folder: Path, recipe: Recipe) -> _Taken:
    """Writes the kernel and its modules."""
    found = sorted((unpacked / "boot").glob("vmlinuz-*"))
    if len(found) != 1:
        raise ImageError(f"the kernel's package has {len(found)} kernels instead of one")
    release = found[0].name.removeprefix("vmlinuz-")
    vmlinux = extract_vmlinux(found[0].read_bytes(), found[0].name)
    (folder / "vmlinux").write_bytes(vmlinux)
    source = _modules_folder(unpacked, release)
    modules = load_order(source, recipe.modules)
    built_in = built_in_modules(source) & {module_name(name) for name in recipe.modules}
    target = root / "usr/lib/modules" / release
    for module in modules:
        path = target / module.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(module.content)
    (target / "modules.dep").write_text(modules_dep(modules))
    return _Taken(
        release,
        len(vmlinux) + sum(len(module.content) for module in modules),
        tuple(module.name for module in modules),
        tuple(sorted(built_in)),
    )


def _modules_folder(unpacked: Path, release: str) -> Path:
    """Where the package has the release's modules: before the merge of /usr, or after it."""
    for place in ("lib/modules", "usr/lib/modules"):
        if (unpacked / place / release).is_dir():
            return unpacked / place / release
    raise ImageError(f"the kernel's package has no modules for {release}")
