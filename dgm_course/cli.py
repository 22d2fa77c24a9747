"""The command line: `dgm-course run | build | train | grade | gradescope | release | bench`."""

import contextlib
import gc
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["app"]

app = typer.Typer(
    help="Deep Generative Models, part 2.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
console = Console(highlight=False)

Names = Annotated[list[str] | None, typer.Argument(help="Which notebooks, such as 03_vae or just 03; all by default.")]
Sources = Annotated[
    list[str] | None, typer.Argument(help="Which notebooks or homework, such as 03 or hw3; all by default.")
]


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
    names: Sources = None,
    stale: Annotated[bool, typer.Option("--stale", help="Only those that differ from their source.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say what is stale, and fail if anything is.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one cell may take.")] = 300,
) -> None:
    """Make the executed notebooks from notebooks/src/*.py, and stubs and solutions of the homework from solutions/*.py."""
    from dgm_course import notebooks, stubs

    root = repository()
    folder = root / "notebooks"
    homework = sorted((root / "solutions").glob("*.py"))
    chosen = choose(names, [*(folder / "src").glob("*.py"), *homework])

    def faults(source: Path) -> list[str]:
        try:
            return (
                stubs.stale(source) if source in homework else notebooks.stale(source, folder / f"{source.stem}.ipynb")
            )
        except notebooks.NotebookError as error:
            return [str(error)]

    def make(source: Path) -> None:
        if source in homework:
            stubs.build(source, timeout)
        else:
            notebooks.build(source, folder, timeout)

    if stale or check:
        found = {source: faults(source) for source in chosen}
        chosen = [source for source in chosen if found[source]]
    if check:
        for source in chosen:
            console.print(f"{source.stem} is stale: {'; '.join(found[source])}", soft_wrap=True)
        raise typer.Exit(1 if chosen else 0)
    failed = each(chosen, make)
    console.print(f"{len(chosen) - failed} of {len(chosen)} notebooks built in {root}")
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
def grade(
    submissions: Annotated[list[Path], typer.Argument(help="Notebooks, or folders of them.")],
    homework: Annotated[str, typer.Option(help="Which homework, such as hw3.")],
    out: Annotated[Path, typer.Option(help="Folder for the grades; one that is there already is gone on with.")],
    jobs: Annotated[int, typer.Option(min=1, help="How many submissions at a time.")] = 2,
    tests: Annotated[Path | None, typer.Option(help="Folder of hidden tests; tests/hidden by default.")] = None,
    notebook_seconds: Annotated[float, typer.Option(min=1, help="Time to execute one notebook.")] = 60,
    exercise_seconds: Annotated[float, typer.Option(min=0.1, help="Time for all cases of one exercise.")] = 10,
    memory_gb: Annotated[float, typer.Option(min=4, help="Memory of a process; importing torch takes 3.3.")] = 6,
    trust: Annotated[bool, typer.Option("--trust", help="Go on where there is no sandbox.")] = False,
    dask: Annotated[str | None, typer.Option(help="Address of a Dask scheduler whose workers grade.")] = None,
) -> None:
    """Grade notebooks by the hidden tests; stopped, the same command goes on where it was."""
    from dgm_course.grading import run, submission
    from dgm_course.grading.exercise import load
    from dgm_course.grading.grade import Limits

    limits = Limits(notebook_seconds, exercise_seconds, memory_gb)
    file = (tests or repository() / "tests" / "hidden") / f"{homework}.py"
    if any(out.resolve().is_relative_to(place.resolve()) for place in submissions):
        stop(f"OUT must lie outside of SUBMISSIONS, or its files would be graded; got {out}")
    try:
        load(file)
        if not (found := submission.find(submissions)):
            stop(f"SUBMISSIONS must hold notebooks; there is nothing in {', '.join(map(str, submissions))}")
        frozen = run.open_folder(out, homework, file.read_text(encoding="utf-8"), limits)
    except (ValueError, OSError) as error:
        stop(str(error))
    try:
        code = collect(run.grade_all(found, frozen, limits, out, jobs=jobs, trust=trust, dask=dask), len(found), out)
    except (run.Untrusted, ModuleNotFoundError, ConnectionError) as error:
        stop(str(error))
    gc.freeze()  # else Python searches all of torch for garbage once more before it ends: long on a busy machine
    raise typer.Exit(code)


def collect(graded: Generator[dict], total: int, out: Path) -> int:
    """Show each result as it comes, then write the reports of those that there are; the exit code."""
    from dgm_course.grading import report, run

    columns = SpinnerColumn(), TextColumn("{task.completed} of {task.total}"), BarColumn(), TimeElapsedColumn()
    results, start, code = [], time.perf_counter(), 0
    try:
        shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        with contextlib.closing(graded), shown as progress:
            task = progress.add_task("grading", total=total)
            for result in graded:
                results.append(result)
                progress.advance(task)
                text = f"{result['student']}  {result['score']:g} of {result['max_score']:g}  {result['problem'] or ''}"
                console.print(text, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        code = 130
    finally:
        if results:
            with run.ctrl_c():  # who presses it twice gets the reports too
                report.write(out, results)
    again = total - len(results) + sum("retry" in result for result in results)
    book = f" Gradebook: {out / 'gradebook.csv'}" if results else ""
    done = f"{len(results)} of {total} submissions in {time.perf_counter() - start:.0f} s.{book}"
    console.print(f"\n{done}", markup=False, soft_wrap=True)
    if again:
        console.print(f"{'Stopped. ' if code else ''}{again} left: the same command goes on with them.")
    return code or bool(again)


@app.command()
def gradescope(
    homework: Annotated[str, typer.Option(help="Which homework, such as hw3.")],
    out: Annotated[Path | None, typer.Option(help="The zip file; build/HOMEWORK_autograder.zip by default.")] = None,
) -> None:
    """Write the autograder zip to upload to Gradescope."""
    from dgm_course.grading.gradescope import bundle

    root = repository()
    try:
        target = bundle(root, homework, (out or root / "build" / f"{homework}_autograder.zip").resolve())
    except ValueError as error:
        stop(str(error))
    console.print(f"{target}: {target.stat().st_size / 2**20:.1f} MB", soft_wrap=True)


@app.command()
def release(
    repo: Annotated[str, typer.Option(help="The students' repository on GitHub, OWNER/NAME.")],
    tag: Annotated[str, typer.Option(help="The tag of it that badges and set-up cells name.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist, or be empty.")],
) -> None:
    """Write what students get: notebooks, stubs and the package; no solutions and no hidden tests."""
    from dgm_course.release import write

    try:
        names = write(repository(), repo, tag, out)
    except ValueError as error:
        stop(str(error))
    for name in names:
        if name.endswith(".ipynb"):
            console.print(name, markup=False)
    console.print(f"{len(names)} files in {out}, to be tagged {tag} in {repo}", markup=False, soft_wrap=True)


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
        if (folder / "notebooks" / "src").is_dir() or (
            folder / "dgm_course" / "homework"
        ).is_dir():  # or a released tree
            return folder
    stop(f"run this inside the course: neither {here} nor a folder above it holds notebooks/src or dgm_course/homework")


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
