"""Every notebook and every stub where it will be opened: an environment that looks like Colab, without a network.

The environment has what ours has (PyTorch and the rest) but not the course, and a module `google.colab`. The notebook of
the release lies alone in an empty folder, and a wheel of the released package in another. Its set-up cell must install
the wheel and touch nothing else, and the notebook must run to its end. Seconds are printed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dgm_course import release

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

# notebooks.py by its path, for the package is not there yet; it needs nothing else of the course.
RUN = """
import runpy, sys
import nbformat
nbformat.write(runpy.run_path(sys.argv[1])["execute"](sys.argv[2], 600), sys.argv[3])
"""


def build_wheel(tree: Path, folder: Path) -> Path:
    """A wheel of the package in a released tree; the tree is left as it is."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(tree, copy, dirs_exist_ok=True)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--wheel-dir", folder, copy], env=os.environ | OFFLINE, check=True)
    (wheel,) = Path(folder).glob("dgm_course-*.whl")
    return wheel


def like_colab(folder: Path) -> tuple[Path, Path]:
    """An environment in `folder` with all packages of this one but the course; returns its Python and its packages."""
    venv.create(folder, symlinks=os.name != "nt")
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    for ours in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for package in Path(ours).iterdir():
            if "dgm_course" not in package.name and not (packages / package.name).exists():
                (packages / package.name).symlink_to(package)
    (folder / "colab" / "google" / "colab").mkdir(parents=True)
    (folder / "colab" / "google" / "colab" / "__init__.py").touch()
    (packages / "colab.pth").write_text(f"{folder / 'colab'}\nimport google.colab\n")  # on Colab it is imported already
    return Path(sysconfig.get_path("scripts", "venv", paths)) / "python", packages


def run(notebook: Path, wheel: Path, folder: Path) -> tuple[Path, set[str]]:
    """Run a notebook in an environment like Colab's; `folder` is filled with what that takes.

    Returns:
        The executed notebook, and the names of the installed packages that came, went or were replaced.

    Raises:
        RuntimeError: If it did not run to its end; says where it stopped.
    """
    python, packages = like_colab(folder / "environment")
    (folder / "alone").mkdir()
    alone, done = shutil.copy(notebook, folder / "alone"), folder / notebook.name
    before = {(package.name, package.is_symlink()) for package in packages.iterdir()}
    command = [*no_network(), python, "-c", RUN, ROOT / "dgm_course" / "notebooks.py", alone, done]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env = clean | OFFLINE | {"DGM_COURSE": str(wheel)}
    ran = subprocess.run(command, cwd=folder / "alone", env=env, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    after = {(package.name, package.is_symlink()) for package in packages.iterdir()}
    return done, {name for name, _ in before ^ after}


def no_network() -> list[str]:
    """What a command begins with to have no network, where the system lets us; nothing elsewhere."""
    prefix = ["unshare", "--map-root-user", "--net"]
    usable = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if usable else []


def main() -> int:
    failed = 0
    table = Table("notebook", "seconds", "installed", "", title="Each notebook alone, as on Colab")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = release.write(ROOT, "owner/name", "main", folder / "tree")
        wheel = build_wheel(folder / "tree", folder / "wheels")
        for name in (name for name in names if name.endswith(".ipynb")):
            began, problem, changed = time.perf_counter(), "", set()
            place = folder / Path(name).stem
            place.mkdir()
            try:
                _, changed = run(folder / "tree" / name, wheel, place)
            except RuntimeError as error:
                failed, problem = failed + 1, str(error)
            seconds = f"{time.perf_counter() - began:.0f}"
            table.add_row(name, seconds, ", ".join(sorted(changed)), problem[-500:] or "✓")
    Console().print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
