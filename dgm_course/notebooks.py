"""Notebooks as files: execute them, build them from their sources, and tell whether a built one is stale.

Needs the extra `dev`; the packages are imported inside the functions, so that the command line starts
fast, and without them.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["NotebookError", "build", "compare", "execute", "finished", "from_source", "stale", "with_ids", "write"]

WIDGET = "application/vnd.jupyter.widget-view+json"

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "name": "python",
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "pygments_lexer": "ipython3",
    },
}


class NotebookError(RuntimeError):
    """A notebook that did not run to its end: which cell, its first line, and the last lines of the traceback."""


def needs_dev(error: ImportError) -> NotebookError:
    """The sentence that helps when the extra `dev` is not installed."""
    return NotebookError(f"{error.name} is not installed; executing notebooks needs: pip install 'dgm-course[dev]'")


def execute(path: str | Path, timeout: float = 300):
    """Run a notebook from top to bottom in this Python, and return it with its outputs; the file is left as it is.

    Arguments:
        path: The .ipynb file. The kernel works in its folder.
        timeout: Seconds that one cell may take.

    Raises:
        NotebookError: If a cell fails or takes too long; names the cell.
    """
    try:
        import nbformat
    except ImportError as error:
        raise needs_dev(error) from error
    path = Path(path)
    return run_cells(nbformat.read(path, as_version=4), path.stem, path.parent, timeout)


def run_cells(notebook, name: str, folder: Path, timeout: float):
    """Run a notebook node in `folder`; the same node comes back with fresh outputs."""
    try:
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as error:
        raise needs_dev(error) from error
    reached = []
    # A progress bar is for who waits; in a stored output it is a dead widget. `training.fit` obeys this too.
    env = {**os.environ, "TQDM_DISABLE": "1"}
    env.pop("MPLBACKEND", None)  # the kernel's own choice puts figures into the notebook
    try:
        with tempfile.TemporaryDirectory() as sockets, tempfile.TemporaryFile() as last_words:
            client = new_client(notebook, folder, timeout, sockets)
            client.on_cell_execute = lambda cell, cell_index: reached.append(cell_index)
            try:
                client.execute(env=env, stderr=last_words, cleanup_kc=True)
            except DeadKernelError as error:
                last_words.seek(0)
                why = last_words.read().decode(errors="replace") + "\nthe kernel died"
                raise NotebookError(failure(notebook, name, reached, why)) from error
    except AssertionError:
        if client.km is not None:
            raise
        raise KeyboardInterrupt from None  # nbclient answers Ctrl-C by ending the kernel, and stumbles over its absence
    except CellExecutionError as error:
        raise NotebookError(failure(notebook, name, reached, error.traceback)) from error
    except CellTimeoutError as error:
        raise NotebookError(failure(notebook, name, reached, f"took longer than {timeout:g} s")) from error
    return notebook


def new_client(notebook, folder: Path, timeout: float, sockets: str):
    """What runs the notebook: a kernel of this very Python, whatever kernels are registered on the machine."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisPython(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(**get_kernel_dict())

    # Sockets in a folder rather than TCP ports: nobody else can connect, and they need no network, not even a loopback.
    ipc = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{sockets}/kernel"}
    return NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=ThisPython(), **ipc),
        timeout=timeout,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )


def failure(notebook, name: str, reached: list[int], traceback: str) -> str:
    """A message that names the cell: its number among all cells, its first line, and how the traceback ends."""
    index = reached[-1] if reached else 0
    first = (notebook.cells[index].source.strip().splitlines() or [""])[0]
    plain = re.sub(r"\x1b\[[0-9;]*m|^-+$", "", traceback, flags=re.MULTILINE).strip().splitlines()
    return "\n".join([f"{name}: cell {index + 1} failed: {first}", *(f"    {line}".rstrip() for line in plain[-6:])])


def from_source(source: str | Path):
    """The unexecuted notebook of a jupytext py:percent file, with ids made of each cell's place and content."""
    try:
        import jupytext
        import nbformat
    except ImportError as error:
        raise needs_dev(error) from error
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return with_ids(notebook)


def with_ids(notebook):
    """The same notebook, the id of each cell made of its place and content."""
    for index, cell in enumerate(notebook.cells):
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()
        cell.id = f"{index:03d}-{digest[:8]}"
    return notebook


def build(source: str | Path, folder: str | Path, timeout: float = 300) -> Path:
    """Make the executed `folder/NN_topic.ipynb` from `NN_topic.py`; it is written only if every cell ran.

    Raises:
        NotebookError: If a cell fails.
    """
    target = Path(folder) / f"{Path(source).stem}.ipynb"
    write(finished(from_source(source), target, timeout), target)
    return target


def finished(notebook, target: Path, timeout: float):
    """Run a notebook node as the file `target` would run; the same node comes back as it is to be stored there."""
    run_cells(notebook, target.stem, target.parent, timeout)
    notebook.metadata = dict(METADATA)  # without the state of widgets, which need a kernel anyway
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output.data.pop(
                    WIDGET, None
                )  # until the cell is run, the slider that needs no kernel is the better one
    return notebook


def write(notebook, target: Path) -> None:
    """Write a notebook through a temporary file, so that an interruption leaves the old one whole."""
    import nbformat

    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        nbformat.write(nbformat.from_dict(notebook), file)
    os.chmod(name, 0o644)
    os.replace(name, target)


def stale(source: str | Path, built: str | Path) -> list[str]:
    """How the cells of a built notebook differ from its source, one sentence each; outputs are never looked at.

    Compares the type, the text, the tags and the id of each cell. An empty list means up to date.
    """
    return compare(from_source(source), built)


def compare(notebook, built: str | Path) -> list[str]:
    """The same for a notebook node in the place of the source."""
    import nbformat

    if not Path(built).is_file():
        return [f"{built} does not exist"]
    return list(differences(notebook.cells, nbformat.read(built, as_version=4).cells))


def differences(wanted: list, found: list) -> Iterator[str]:
    """One sentence for each cell of `found` that is not the one in `wanted`."""
    if len(wanted) != len(found):
        yield f"the source has {len(wanted)} cells, the notebook {len(found)}"
    for number, (a, b) in enumerate(zip(wanted, found, strict=False), start=1):
        for what, left, right in [
            ("type", a.cell_type, b.cell_type),
            ("text", a.source, b.source),
            ("tags", a.metadata.get("tags", []), b.metadata.get("tags", [])),
            ("id", a.id, b.get("id")),
        ]:
            if left != right:
                yield f"cell {number}: the {what} differs"
