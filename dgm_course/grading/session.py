"""A conversation with one submission: requests out, replies in, within a time; and no trust in anything that comes."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from dgm_course.grading import wire
from dgm_course.grading.sandbox import sandboxed

__all__ = ["Broken", "Late", "Session", "session"]

KEPT = 20_000  # bytes of what a submission prints
START = 60.0  # seconds that Python may take to start, on a busy machine
LOOK = 0.2  # seconds after which a session looks whether the grader shall stop


class Broken(Exception):
    """The submission's process ended, or sent what is no reply."""


class Late(Exception):
    """No reply within the time."""


class Session:
    """The grader's end of the pipes. Use `session`, which also cleans up.

    Arguments:
        process: The runner, with its output in a pipe.
        requests, replies: File descriptors to write to and to read from.
        stop: Empty until the grader shall stop.
    """

    def __init__(self, process: subprocess.Popen, requests: int, replies: int, stop: Sequence = ()):
        self.process, self.requests, self.replies, self.stop = process, requests, replies, stop
        self.printed, self.dropped = bytearray(), 0
        self.received = bytearray()
        for pipe in (requests, replies, process.stdout.fileno()):
            os.set_blocking(pipe, False)

    def ask(self, form, arrays: list[np.ndarray], seconds: float) -> tuple[object, list[np.ndarray]]:
        """Send a request and return the reply: JSON, and arrays that are plain numbers.

        Raises:
            Late: If it takes longer.
            Broken: If the process ends, or the reply is malformed, or one was there already: it would be taken for another.
            KeyboardInterrupt: If the grader shall stop.
        """
        self.read()
        if self.received:
            raise Broken("the notebook sent a reply before it was asked")
        return self.exchange(memoryview(wire.frame(form, arrays)), time.monotonic() + seconds)

    def next(self, seconds: float) -> tuple[object, list[np.ndarray]]:
        """A further reply to the last request."""
        return self.exchange(memoryview(b""), time.monotonic() + seconds)

    def exchange(self, unsent: memoryview, deadline: float) -> tuple[object, list[np.ndarray]]:
        while unsent or (payload := self.complete()) is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self.replies, selectors.EVENT_READ)
                if not self.process.stdout.closed:
                    ready.register(self.process.stdout, selectors.EVENT_READ)
                if unsent:
                    ready.register(self.requests, selectors.EVENT_WRITE)
                events = ready.select(max(0.0, min(LOOK, deadline - time.monotonic())))
            if self.stop:
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise Late
            for key, _ in events:
                if key.fd == self.requests:
                    unsent = self.write(unsent)
                elif key.fd == self.replies:
                    self.read()
                else:
                    self.listen()
        try:
            return wire.unpack(payload, wire.HEADER)
        except ValueError as error:
            raise Broken(str(error)) from None

    def complete(self) -> bytes | None:
        """The payload of the next frame, once it has come whole."""
        if len(self.received) < 4:
            return None
        try:
            end = 4 + wire.length(self.received[:4])
        except ValueError as error:
            raise Broken(str(error)) from None
        if len(self.received) < end:
            return None
        payload = bytes(self.received[4:end])
        del self.received[:end]
        return payload

    def write(self, data: memoryview) -> memoryview:
        try:
            return data[os.write(self.requests, data) :]
        except BlockingIOError:
            return data
        except BrokenPipeError:
            raise Broken(self.ended()) from None

    def read(self) -> None:
        piece = available(self.replies)
        if piece == b"":
            raise Broken(self.ended())
        self.received += piece or b""

    def listen(self) -> None:
        """Keep the beginning of what is printed, and drop the rest."""
        piece = available(self.process.stdout.fileno())
        if piece is None:
            return
        if not piece:
            self.process.stdout.close()
        room = KEPT - len(self.printed)
        self.printed += piece[:room]
        self.dropped += max(0, len(piece) - room)

    def ended(self) -> str:
        """How the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1)
            return f"the notebook's process ended by itself (exit code {code})"
        return "the notebook closed the connection to the grader"

    @property
    def output(self) -> str:
        """What was printed, cut; with a word on how much is missing."""
        if not self.process.stdout.closed:
            self.listen()
        text = self.printed.decode(errors="replace")
        return f"{text}\n… and {self.dropped} bytes more" if self.dropped else text


def available(pipe: int) -> bytes | None:
    """What can be read now: nothing at its end, None before. A submission can open the pipe too, and read it dry."""
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe, 2**20)
    return None


@contextlib.contextmanager
def session(level: str, limits: dict, stop: Sequence = ()) -> Iterator[Session]:
    """Start a runner at an isolation level; when the block ends, whatever is left of it is killed."""
    runner_reads, requests = os.pipe()
    replies, runner_writes = os.pipe()
    with sandboxed(level) as (prefix, where), contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, replies)
        command = [*prefix, sys.executable, "-m", "dgm_course.grading.runner", str(runner_reads), str(runner_writes)]
        try:
            process = subprocess.Popen(
                [*command, json.dumps(limits)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(runner_reads, runner_writes),
                start_new_session=True,
                **where,
            )
        finally:
            os.close(runner_reads)
            os.close(runner_writes)
        try:
            yield Session(process, requests, replies, stop)
        finally:
            os.close(requests)  # an honest runner ends now
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
