"""Grading on a Dask cluster: the same gradebook as here, whatever happens to its workers."""

import os
import shutil
import signal
import sys
import threading
import time

import dask
import pytest
from distributed import LocalCluster
from test_grading import CLASS, DOUBLE, MEMORY, MOMENTS, arguments, call, gradebook, hand_in, hidden, ours, read, until

from dgm_course.grading.sandbox import level

SLOW = "import time\ntime.sleep(0.5)"
STUDENTS = {name: CLASS[name] and [SLOW, *CLASS[name]] for name in ("ada", "bob", "cem", "dee", "fay")}
STUDENTS |= {name: [SLOW, DOUBLE, MOMENTS] for name in ("gus",)}


@pytest.fixture
def course(tmp_path):
    hidden(tmp_path / "hidden")
    hand_in(tmp_path / "subs", STUDENTS)
    return tmp_path


def kill_one(cluster, out, killed: list) -> None:
    """End a worker, in the middle of a task, once there is a result."""
    workers = cluster.scheduler.workers
    busy = lambda: [one for one in cluster.workers.values() if workers.get(one.worker_address)]  # noqa: E731
    until(lambda: list(out.glob("results/*.json")), 60)
    until(lambda: any(workers[one.worker_address].processing for one in busy()), 10)
    time.sleep(0.3)
    victim = next(one for one in busy() if workers[one.worker_address].processing)
    killed.append(len(workers[victim.worker_address].processing))
    os.kill(victim.pid, signal.SIGKILL)


def test_a_worker_killed_in_the_middle_changes_no_grade(course, capfd):
    if level() != "bubblewrap":
        pytest.skip("bubblewrap does not work here, so nothing was graded")
    out, killed = course / "cluster", []
    place = {"host": "127.0.0.1", "dashboard_address": None, "local_directory": str(course)}
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **place) as cluster:
        killer = threading.Thread(target=kill_one, args=(cluster, out, killed))
        killer.start()
        result = call(*arguments(course, out, "--memory-gb", MEMORY, "--dask", cluster.scheduler_address))
        killer.join()
        assert result.exit_code == 0 and "6 of 6 submissions" in result.output
        assert until(lambda: not ours(MEMORY), 2), ours(MEMORY)
    assert killed and killed[0] > 0, "the worker was to have work when it was killed"
    assert len(capfd.readouterr().err.splitlines()) < 20  # no flood of warnings

    (course / "here").mkdir()
    shutil.copy(out / "run.json", course / "here")  # the same seed
    call(*arguments(course, course / "here", "--memory-gb", MEMORY, "--jobs", 2))
    assert gradebook(out) == gradebook(course / "here") and read(out) == read(course / "here")
    scores = {row["student"]: row["score"] for row in gradebook(out)}
    assert scores == {"ada": "5", "bob": "2", "cem": "0", "dee": "0", "fay": "5", "gus": "5"}


def test_without_dask_it_says_what_to_install(course, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    result = call(*arguments(course, course / "out", "--trust", "--dask", "tcp://127.0.0.1:8786"))
    assert result.exit_code == 2 and "pip install 'dgm-course[cluster]'" in result.output


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere"])
def test_an_address_without_a_scheduler_is_explained(course, address):
    with dask.config.set({"distributed.comm.timeouts.connect": "500ms"}):
        result = call(*arguments(course, course / "out", "--dask", address))
    assert (
        result.exit_code == 2
        and f"--dask must be a scheduler's address, as tcp://HOST:8786; {address}:" in result.output
    )
    assert not (course / "out" / "results").exists()
