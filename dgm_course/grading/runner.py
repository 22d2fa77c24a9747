"""The submission's side: executes its cells, and calls its functions with inputs from the pipe. Runs inside the sandbox.

`python -m dgm_course.grading.runner REQUESTS REPLIES LIMITS`: two file descriptors, and the limits as JSON. Whatever a
submission does to this process, it can only answer; what is right is known elsewhere.
"""

import contextlib
import difflib
import json
import os
import select
import signal
import sys
import time

__all__ = ["main"]


def main() -> None:
    """Answer requests until the pipe is closed."""
    requests, replies, limits = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    limit(limits)
    from dgm_course.grading import wire

    with os.fdopen(requests, "rb") as file:
        while head := file.read(4):
            request, arrays = wire.unpack(file.read(wire.length(head)))
            if "execute" in request:
                form = execute(request["execute"], lambda number: send(replies, wire.frame({"cell": number}, [])))
                send(replies, wire.frame(form, []))
            else:
                send(replies, ask_in_fork(request, arrays))
    os._exit(0)  # whatever threads the submission has left


def limit(limits: dict) -> None:
    """Bound what this process and its children may use, and die with the grader."""
    import resource

    bounds = {
        "RLIMIT_AS": int(limits["memory_gb"] * 2**30),  # importing torch alone peaks at 3.3 GB of addresses
        "RLIMIT_CPU": int(limits["cpu_seconds"]),
        "RLIMIT_FSIZE": 64 * 2**20,
        "RLIMIT_NPROC": limits["processes"] or resource.RLIM_INFINITY,
        "RLIMIT_NOFILE": 256,
        "RLIMIT_CORE": 0,
    }
    for name, bound in bounds.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):  # not every system knows or grants each of them
            resource.setrlimit(getattr(resource, name), (bound, bound))
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, on Linux


def execute(cells: list[str], starts) -> dict:
    """Run the cells one after the other, as a notebook does; a cell that fails does not stop the next."""
    global SHELL
    from IPython.core.interactiveshell import InteractiveShell

    import dgm_course.homework  # noqa: F401  with torch: loaded here, it is there in every fork

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None):
            """There is no window; `%matplotlib inline` asks for one."""

    SHELL = shell = Shell.instance()
    shell.history_manager.enabled = False
    failed, streams = [], (sys.stdout, sys.stderr)
    for number, source in enumerate(cells):
        starts(number)
        try:
            result = shell.run_cell(source, store_history=False)
            error = result.error_before_exec or result.error_in_exec
            told = None if error is None else f"{type(error).__name__}: {str(error)[:300]}"
        except BaseException as error:  # IPython itself stumbles, over what a cell has broken
            told = f"{type(error).__name__} while the cell was run"
        if told is not None:
            failed.append({"cell": number, "error": told})
        sys.stdout, sys.stderr = streams  # a cell may have put others in their place
    return {"failed": failed}


SHELL = None


def ask_in_fork(request: dict, arrays: list) -> bytes:
    """Let a child process answer, and return its frame; or a frame that says how it ended without."""
    from dgm_course.grading import wire

    with contextlib.suppress(ValueError):  # a cell may have closed it
        sys.stdout.flush()
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            os.setpgid(0, 0)
            send(writable, answer(request, arrays))
        finally:
            os._exit(0)
    os.close(writable)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)
    data, late = collect(readable, time.monotonic() + request["seconds"], wire.LONGEST + 4)
    os.close(readable)
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if late:
        return wire.frame({"late": True}, [])
    if len(data) < 4 or len(data) != 4 + int.from_bytes(data[:4], "big"):
        return wire.frame({"died": os.waitstatus_to_exitcode(status)}, [])
    return data


def collect(readable: int, deadline: float, most: int) -> tuple[bytes, bool]:
    """What comes through a pipe until it is closed, and whether the time ran out before."""
    data = bytearray()
    while len(data) <= most:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([readable], [], [], left)[0]:
            return bytes(data), True
        piece = os.read(readable, 2**20)
        if not piece:
            break
        data += piece
        end = 4 + int.from_bytes(data[:4], "big")
        if len(data) >= 4 and not len(data) < end <= most:
            break  # it is complete, and a thread of the submission may keep the pipe open; or it is too long to be read
    return bytes(data), False


def answer(request: dict, arrays: list) -> bytes:
    """What the function named in the request answers to each case, as a frame."""
    import torch

    from dgm_course.grading import wire
    from dgm_course.homework.ask import ask, without
    from dgm_course.homework.values import decode, encode

    torch.set_num_threads(1)
    function = SHELL.user_ns.get(request["ask"])
    if not callable(function):
        known = [name for name, value in SHELL.user_ns.items() if callable(value)]
        return wire.frame({"missing": difflib.get_close_matches(request["ask"], known, n=1)}, [])
    sent, answers = [], []
    with without(request["forbidden"]) as called:
        for case in request["cases"]:
            reply = ask(
                function, {name: decode(form, arrays, lambda a: torch.tensor(a)) for name, form in case.items()}
            )
            if "inputs" in reply:
                reply["inputs"] = list(reply["inputs"].values())
            answers.append({key: encode(value, sent) for key, value in reply.items()})
    return wire.frame({"answers": answers, "called": called[:1]}, sent)


def send(target: int, data: bytes) -> None:
    """Write all of the data to a file descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


if __name__ == "__main__":
    main()
