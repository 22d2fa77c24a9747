"""The command line: `dgm-course run | build | train | bench`."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["app"]

app = typer.Typer(
    help="Deep Generative Models, part 2.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
console = Console(highlight=False)

Names = Annotated[list[str] | None, typer.Argument(help="Which notebooks, such as 03_vae or just 03; all by default.")]


@app.command()
def run(
    names: Names = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pages; build/ in the repository by default.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one cell may take.")] = 300,
) -> None:
    """Execute the notebooks and write a readable page of each; notebooks/ itself is left as it is."""
    from dgm_course import notebooks, pages

    root = repository()
    chosen = choose(names, (root / "notebooks").glob("*.ipynb"))
    out = (out or root / "build").resolve()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # A copy: what a notebook writes beside itself must not land in the repository.
        copy = Path(folder) / "notebooks"
        shutil.copytree(root / "notebooks", copy, ignore=shutil.ignore_patterns("src", ".ipynb_checkpoints"))

        def make(notebook: Path) -> None:
            page = out / f"{notebook.stem}.html"
            page.unlink(missing_ok=True)  # no old page survives a failure
            pages.write_page(notebooks.execute(copy / notebook.name, timeout), page, copy)

        failed = each(chosen, make)
    if (root / "README.md").is_file():
        pages.write_readme(root / "README.md", out)
    index = pages.write_index(out)
    done = len(chosen) - failed
    console.print(f"\n{done} of {len(chosen)} notebooks ran in {time.perf_counter() - start:.0f} s. Pages: {out}")
    console.print(f"Open {index.as_uri()} in a browser.", soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def build(
    names: Names = None,
    stale: Annotated[bool, typer.Option("--stale", help="Only those that differ from their source.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say what is stale, and fail if anything is.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one cell may take.")] = 300,
) -> None:
    """Make the executed notebooks/*.ipynb from notebooks/src/*.py."""
    from dgm_course import notebooks

    folder = repository() / "notebooks"
    chosen = choose(names, (folder / "src").glob("*.py"))
    if stale or check:
        found = {source: notebooks.stale(source, folder / f"{source.stem}.ipynb") for source in chosen}
        chosen = [source for source in chosen if found[source]]
    if check:
        for source in chosen:
            console.print(f"{source.stem} is stale: {'; '.join(found[source])}", soft_wrap=True)
        raise typer.Exit(1 if chosen else 0)
    failed = each(chosen, lambda source: notebooks.build(source, folder, timeout))
    console.print(f"{len(chosen) - failed} of {len(chosen)} notebooks built in {folder}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="The recipe, such as mnist-unet.")],
    source: Annotated[
        str | None, typer.Option(help="The full data: a folder or 'hub'. Packaged cut by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the state to resume from.")] = Path("runs"),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps instead of the recipe's.")] = None,
) -> None:
    """Train a checkpoint by its recipe; stopped, the same command goes on where it was."""
    from dgm_course import recipes

    if recipe not in recipes.names():
        stop(f"no recipe is called {recipe!r}; there are: {', '.join(recipes.names())}")
    recipes.train(recipe, source=source, out=out, steps=steps)


@app.command()
def bench() -> None:
    """Run every benchmark of bench/."""
    root = repository()
    scripts = sorted((root / "bench").glob("*.py"))
    if not scripts:
        stop(f"no benchmark in {root / 'bench'}")
    codes = [subprocess.run([sys.executable, script], cwd=root).returncode for script in scripts]
    raise typer.Exit(1 if any(codes) else 0)


def repository() -> Path:
    """The folder, from the current one upwards, that holds the course; stops where there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks" / "src").is_dir():
            return folder
    stop(f"run this inside the course's repository: neither {here} nor a folder above it holds notebooks/src")


def choose(names: list[str] | None, files: Iterable[Path]) -> list[Path]:
    """The files that the names ask for, by stem or by the start of it; all of them without names."""
    files = sorted(files)
    chosen = []
    for name in names or []:
        stem = Path(name).stem
        found = [file for file in files if file.stem == stem] or [file for file in files if file.stem.startswith(stem)]
        if len(found) != 1:
            known = ", ".join(file.stem for file in files) or "none"
            stop(f"{name!r} names {len(found) or 'no'} notebook{'s' * (len(found) > 1)}; there are: {known}")
        chosen += found
    if not files:
        stop("there is no notebook yet")
    return sorted(set(chosen)) or files


def each(files: list[Path], work: Callable[[Path], object]) -> int:
    """Do the work for each file, with a line for each; an error is shown and counted, and the rest goes on."""
    from dgm_course.notebooks import NotebookError

    width = max((len(file.stem) for file in files), default=0)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    failed = 0
    for file in files:
        start = time.perf_counter()
        problem = None
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            progress.add_task(file.stem.ljust(width))
            try:
                work(file)
            except NotebookError as error:
                problem = error
        mark = "[red]✗[/red]" if problem else "[green]✓[/green]"
        console.print(f"{mark} {file.stem.ljust(width)}  {time.perf_counter() - start:6.1f} s")
        if problem:
            failed += 1
            console.print(str(problem), markup=False, soft_wrap=True)
    return failed


def stop(message: str) -> None:
    """Say what is wrong with the call and leave with exit code 2."""
    Console(stderr=True, highlight=False).print(f"dgm-course: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
