"""The house holds together: light imports, floors, dependencies, the two doors (make and conda), the command line."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dgm_course import __version__, cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = sorted((ROOT / "dgm_course").rglob("*.py"))

FLOORS = {
    "paths schedules toy divergences data checks homework": 0,
    "denoisers nets": 1,
    "losses samplers guidance likelihood vae gan flows cold equivariant": 2,
    "tables resume training metrics checkpoints distillation editing latent clip peft": 3,
    "viz objectives distilling measures personal recipes": 4,
    "notebooks pages stubs release grading cli": 5,
}
FLOOR = {name: floor for names, floor in FLOORS.items() for name in names.split()}

# The package that brings a module, where the names differ or where another package always brings it along.
BROUGHT_BY = {"IPython": "ipywidgets", "PIL": "pillow", "jupyter_client": "nbclient", "pyarrow": "datasets"}


def python(code: str) -> str:
    """What a fresh interpreter prints for the code."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def imported(file: Path) -> set[str]:
    """The dotted names that a module imports anywhere in it, `from a import b` as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# Imports


@pytest.mark.parametrize("module", ["dgm_course", "dgm_course.cli"])
def test_importing_the_package_or_its_command_line_loads_nothing_heavy(module):
    heavy = "torch numpy matplotlib datasets accelerate scipy sympy pandas IPython".split()
    assert python(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_importing_paths_costs_torch_and_no_more():
    asked = "torch matplotlib datasets accelerate scipy sympy pandas ipywidgets IPython".split()
    found = python(f"import sys; from dgm_course import paths; print([m for m in {asked} if m in sys.modules])")
    assert found == "['torch']\n"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_from_lower_floors_or_from_its_own(file):
    own = file.relative_to(ROOT / "dgm_course").with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in FLOOR, f"give {own} a floor in {Path(__file__).name}"
    for other in {found.split(".")[1] for found in imported(file) if found.startswith("dgm_course.")} & FLOOR.keys():
        assert FLOOR[other] <= FLOOR[own], f"{own} (floor {FLOOR[own]}) imports {other} (floor {FLOOR[other]})"


def test_modules_have_no_import_cycle():
    graph = {}
    for file in MODULES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        graph[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = imported(file)

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        for other in (graph[module] & graph.keys()) - {"dgm_course", module}:
            # A package's own modules may name the package they are in; what counts is a way back to the same module.
            if not module.startswith(f"{other}."):
                visit(other, (*above, module))

    for module in graph:
        visit(module, ())


# Dependencies


def test_every_import_is_a_declared_dependency():
    declared = {name(requirement) for requirement in PROJECT["dependencies"]}
    tools = declared | {name(requirement) for requirement in EXTRAS["dev"]}
    lazy_tools = {"notebooks.py", "pages.py", "stubs.py", "run.py"}
    for file in MODULES:
        allowed = tools if file.name in lazy_tools else declared
        for module in {found.split(".")[0] for found in imported(file)} - sys.stdlib_module_names - {"dgm_course"}:
            package = BROUGHT_BY.get(module, module).lower().replace("_", "-")
            assert package in allowed, f"{file.relative_to(ROOT)} imports {module}, which is not declared"


def test_dependencies_have_lower_bounds_only():
    for requirement in [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement), requirement


def test_constraints_are_exact_and_cover_every_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values())  # no +cpu, no address
    pinned = {name(package) for package in pins}
    assert {
        name(requirement) for group in (PROJECT["dependencies"], *EXTRAS.values()) for requirement in group
    } <= pinned
    assert pins["torch"] == "2.13.0"


def test_the_conda_door_says_what_pyproject_says():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = environment["dependencies"]
    assert environment["channels"] == ["conda-forge"]
    assert packages == [f"python{PROJECT['requires-python']}", "pip"]
    (editable,) = pip["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", editable)[1].split(",")
    assert set(extras) <= set(EXTRAS)


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"])
def test_no_file_names_a_registry(file):
    assert not re.search(r"https?://|index-url|find-links|trusted-host", (ROOT / file).read_text())


def test_the_version_is_stated_once():
    assert PROJECT["dynamic"] == ["version"] and re.fullmatch(r"\d+\.\d+\.\d+", __version__)


# Make

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


@pytest.fixture
def house(tmp_path):
    """A copy of what make reads, in a folder with a space in its name."""
    house = tmp_path / "a house"
    house.mkdir()
    for file in ["Makefile", "pyproject.toml", "constraints.txt"]:
        shutil.copy(ROOT / file, house)
    return house


def make(house: Path, *arguments: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=house, env=clean, capture_output=True, text=True)


def fake_python(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_make
def test_after_the_install_no_target_calls_pip(house):
    assert "pip install" in make(house, "-n", "run").stdout
    (house / ".venv").mkdir()
    (house / ".venv" / "installed").touch()
    for target in ["run", "test", "build", "bench"]:
        assert "pip" not in make(house, "-n", target).stdout


@needs_make
@pytest.mark.parametrize("code", [0, 1])
def test_a_finished_install_leaves_a_stamp_and_an_interrupted_one_none(house, code):
    installer = f'mkdir -p .venv/bin; printf "#!/bin/sh\\nexit {code}\\n" > .venv/bin/python; chmod +x .venv/bin/python'
    fake_python(house / "fake" / "python", f'[ "$1" = -m ] && {{ {installer}; }}; exit 0')
    done = make(house, ".venv", "PYTHON=fake/python")
    assert (done.returncode == 0) == (code == 0) and (house / ".venv" / "bin" / "python").exists()
    assert (house / ".venv" / "installed").exists() == (code == 0)


@needs_make
def test_an_old_python_is_refused_with_a_sentence(house):
    fake_python(house / "fake" / "python", "exit 1")
    done = make(house, "run", "PYTHON=fake/python")
    assert done.returncode != 0 and "Python 3.11 or newer is needed" in done.stdout
    oldest = re.search(r"version_info < \((\d+), (\d+)\)", (house / "Makefile").read_text())
    assert PROJECT["requires-python"] == f">={oldest[1]}.{oldest[2]}"
    assert not (house / ".venv").exists()


def test_ci_run_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# Command line


@pytest.mark.parametrize(
    ("arguments", "say"),
    [
        (["run", "nonesuch"], ["'nonesuch'", "01_one, 02_two"]),
        (["build", "0"], ["'0'", "2 notebooks"]),
        (["train", "mnist-unett"], ["'mnist-unett'", "mnist-unet"]),
        (["bench"], ["no benchmark"]),
        (["trian"], ["trian"]),
    ],
)
def test_a_wrong_name_says_what_came_and_what_is_asked(arguments, say, tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    for stem in ["01_one", "02_two"]:
        (tmp_path / "notebooks" / f"{stem}.ipynb").touch()
        (tmp_path / "notebooks" / "src" / f"{stem}.py").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert all(part in done.output for part in say), done.output


def test_outside_the_repository_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["run"])
    assert done.exit_code == 2 and "notebooks/src" in done.output


def test_bench_runs_every_script_and_fails_if_one_fails(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("raise SystemExit(1)")
    (tmp_path / "bench" / "b.py").write_text("open('b ran', 'w')")
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli.app, ["bench"]).exit_code == 1
    assert (tmp_path / "b ran").exists()
