"""Grade many submissions: side by side or on a cluster, each result kept as soon as it is there."""

import contextlib
import hashlib
import json
import secrets
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from dgm_course.grading.grade import HiddenTests, Limits, failure, grade
from dgm_course.grading.report import write_atomically
from dgm_course.grading.sandbox import level
from dgm_course.grading.submission import Submission

__all__ = ["Untrusted", "ctrl_c", "finished", "grade_all", "open_folder"]


class Untrusted(RuntimeError):
    """This machine has no sandbox, and nobody said that the submissions can be trusted."""


def open_folder(out: Path, homework: str, text: str, limits: Limits) -> HiddenTests:
    """The tests that a folder of grades is for: with its seed if there is one already, else with a new one.

    What a grader that was killed was writing is removed.

    Raises:
        ValueError: If the folder holds grades by other tests or limits, or other files.
    """
    wanted = {"homework": homework, "tests": hashlib.sha256(text.encode()).hexdigest(), "limits": asdict(limits)}
    file = out / "run.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT must be a folder; {out} is a file")
    unfinished = [*out.glob(".*.part"), *out.glob("*/.*.part")]
    if file.is_file():
        seed = kept(file, wanted)
    elif out.is_dir() and set(out.iterdir()) - set(unfinished):
        raise ValueError(f"OUT must be new, empty or a folder of grades; {out} holds other files")
    else:
        seed = secrets.randbelow(2**31)
        write_atomically(file, json.dumps({**wanted, "seed": seed}, indent=1))
    for part in unfinished:
        part.unlink(missing_ok=True)
    return HiddenTests(homework, text, seed)


def kept(file: Path, wanted: dict) -> int:
    """The seed in a `run.json`, whose other content must be what is wanted."""
    try:
        there = dict(json.loads(file.read_text(encoding="utf-8")))
        seed = int(there["seed"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"OUT must be new, empty or a folder of grades; {file} is of something else") from None
    for key, value in wanted.items():
        if there.get(key) != value:
            how = "their file has changed since" if key == "tests" else str(there.get(key))
            raise ValueError(f"OUT must be new or of the same run; {file.parent} was graded with other {key}: {how}")
    return seed


def finished(out: Path, submission: Submission) -> dict | None:
    """The result of a submission, if it was graded before and has not changed since."""
    file = out / "results" / f"{submission.student}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["sha256"] == submission.sha256 and result["file"] == submission.file and not result.get("retry"):
            return result
    return None


def grade_all(
    submissions: list[Submission],
    tests: HiddenTests,
    limits: Limits,
    out: Path,
    *,
    jobs: int = 1,
    trust: bool = False,
    dask: str | None = None,
) -> Iterator[dict]:
    """Grade the submissions that have no result yet; yields every result, and writes it before.

    Arguments:
        submissions, tests, limits: What is graded, by what, and what it may use.
        out: The folder of grades, from `open_folder`.
        jobs: How many at a time on this machine.
        trust: Whether to go on where there is no sandbox.
        dask: The address of a Dask scheduler; its workers grade instead of this machine.

    Raises:
        Untrusted: If there is no sandbox, and no trust.
        ModuleNotFoundError, ConnectionError: If there is no Dask, or no scheduler at its address.
    """
    waiting = []
    for submission in submissions:
        result = finished(out, submission)
        if result is None:
            waiting.append(submission)
        else:
            yield result
    if not waiting:
        return
    new = on_cluster(dask, waiting, tests, limits, trust) if dask else here(waiting, tests, limits, trust, jobs)
    with contextlib.closing(new):  # at once, whatever happens here: else what still runs would be waited for
        for result in new:
            write_atomically(out / "results" / f"{result['student']}.json", json.dumps(result, indent=1))
            yield result


def one(submission: Submission, tests: HiddenTests, limits: Limits, trust: bool, stop: Sequence = ()) -> dict:
    """Grade one submission on the machine where this is called; a KeyboardInterrupt once `stop` is not empty."""
    found = level()
    if found != "bubblewrap" and not trust:
        raise Untrusted(
            f"bubblewrap does not work on this machine; the isolation level would be {found!r}. "
            "Strangers' code could read the hidden tests and your files. Install bubblewrap (Linux), or say --trust"
        )
    try:
        return grade(submission, tests, limits, found, stop)
    except Exception as error:  # a fault of the grader's must not stop the others
        return failure(submission, tests, limits, f"the grader failed, and tries again next time: {error!r}")


def here(waiting: list[Submission], tests: HiddenTests, limits: Limits, trust: bool, jobs: int) -> Iterator[dict]:
    """Grade on this machine, several at a time; an interruption ends those that run."""
    with ctrl_c() as stop, ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(one, submission, tests, limits, trust, stop) for submission in waiting]
            for future in as_completed(futures):
                yield future.result()  # or the KeyboardInterrupt of a session that was stopped
        finally:
            stop.append("all that still run")
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def ctrl_c() -> Iterator[list]:
    """Within the block, Ctrl-C only fills the list.

    Python would raise KeyboardInterrupt wherever the main thread is: in the middle of a report, or where nobody sees it.
    """
    pressed: list = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append("Ctrl-C"))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def on_cluster(
    address: str, waiting: list[Submission], tests: HiddenTests, limits: Limits, trust: bool
) -> Iterator[dict]:
    """Grade on the workers of a Dask cluster; what a dead worker had is done by another."""
    try:
        from distributed import Client, as_completed
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--dask needs the extra cluster: pip install 'dgm-course[cluster]'") from error
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"--dask must be a scheduler's address, as tcp://HOST:8786; {address}: {error}") from None
    with client:
        # The tests go along with each task: data left with the workers would be lost with the last of them.
        futures = {
            client.submit(one, submission, tests, limits, trust, pure=False): submission for submission in waiting
        }
        for future in as_completed(futures):
            error = CancelledError("the scheduler is gone") if future.cancelled() else future.exception()
            if isinstance(error, Untrusted):
                raise error
            why = f"the cluster could not grade it, and tries again next time: {error!r}"
            yield failure(futures[future], tests, limits, why) if error else future.result()
