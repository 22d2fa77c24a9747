"""Submissions that attack the grader, each in the real sandbox: none gets more than its fair score, and each is told why."""

import json
import math
import os
import random
import resource
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dgm_course.grading import grade as grading
from dgm_course.grading import run, sandbox, wire
from dgm_course.grading.exercise import parse
from dgm_course.grading.grade import LATE, Limits
from dgm_course.grading.session import Broken, Session
from dgm_course.grading.submission import Submission
from dgm_course.homework.values import decode, encode

ROOT = Path(__file__).parents[1]
SEED = 77
SECRET = f"SECRET{secrets.token_hex(8)}"  # stands in the hidden tests; no submission may find it

needs_walls = pytest.mark.skipif(
    sandbox.level() != "bubblewrap",
    reason=f"bubblewrap does not work here (level {sandbox.level()!r}): THE ATTACKS ON THE GRADER ARE NOT TESTED",
)

# A homework: every exercise asks for the same function, two visible points and three hidden ones ------------------------

TEXT = f'''
import torch
from dgm_course.grading.exercise import Exercise, Group

def blend(x0, t, eps):
    """{SECRET}"""
    return (1 - t[:, None]) * x0 + t[:, None] * eps

def cases(*shapes):
    def make(g):
        return [{{"x0": torch.randn(shape, generator=g), "t": torch.rand(shape[:1], generator=g),
                 "eps": torch.randn(shape, generator=g)}} for shape in shapes]
    return make

def unscaled(x0, t, eps):
    return x0 + t[:, None] * eps

EXERCISES = [
    Exercise(name, 5, 10, 1, blend, ("xt",), Group(2, cases((2, 3), (4, 1))),
             {{"odd shapes": Group(2, cases((3, 5), (7, 2))), "a batch of one": Group(1, cases((1, 2)))}},
             {{"you left x0 unscaled": (unscaled, "{SECRET}")}}, {{}}, forbidden=("paths.GaussianPath.perturb",))
    for name in NAMES
]
'''

RIGHT = "(1 - t[:, None]) * x0 + t[:, None] * eps"
HEAD = """
import ctypes, gc, json, os, re, signal, socket, struct, subprocess, sys, threading, time
import numpy, torch
"""


def homework(*names: str) -> grading.HiddenTests:
    return grading.HiddenTests("hwX", f"NAMES = {list(names)!r}\n{TEXT}", SEED)


def function(body: str, name: str = "blend") -> str:
    return f"def {name}(x0, t, eps):\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n"


GOOD, BAD = function(f"return {RIGHT}"), function("return torch.zeros_like(x0)")


def notebook(*cells: str) -> bytes:
    kind = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [{**kind, "source": textwrap.dedent(cell)} for cell in (HEAD, *cells)]
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}).encode()


def alive(marker: str) -> list[str]:
    """The command lines of processes of this machine that hold the marker, after a moment to die."""
    for _ in range(40):
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += [file.read_text(errors="replace")] if marker.encode() in file.read_bytes() else []
            except OSError:
                continue
        if not found:
            break
        time.sleep(0.05)
    return found


def graded(*cells: str, names=("blend",), content=None, seconds=10.0, each=2.0, trust=False) -> dict:
    """The result of a submission; the grader has not stumbled, and nothing of the submission lives on.

    The memory limit stands in the command line of the runner and of every process that it forks: it marks them.
    """
    memory = 6 + secrets.randbelow(10**9) / 1e12
    content = notebook(*cells) if content is None else content
    submission = Submission("mallory", "mallory/hwX.ipynb", content)
    result = run.one(submission, homework(*names), Limits(seconds, each, memory), trust=trust)
    assert "retry" not in result, result["problem"]  # that is how a fault of the grader's own is noted
    assert alive(repr(memory)) == []
    assert len(json.dumps(result)) < 200_000
    assert result["max_score"] == 5 * len(names) and SECRET not in result["output"]
    return result


def reasons(result: dict) -> str:
    return f"{result['problem']} | {result['exercises'][0]['message']}"


# Attacks within a function: each function is one exercise of one submission --------------------------------------------

PICKLE = "class Payload:\n    def __reduce__(self): return (os.system, (f'touch {PWNED}',))\n"
FUNCTIONS = {
    # name: (score, a part of the reason, the body of the function)
    "honest": (5, "✓ right", f"return {RIGHT}"),
    "endless": (0, "no answer within 3 seconds", "while True: pass"),
    "exits": (0, "raised SystemExit in line 2", "sys.exit(0)"),
    "dies": (0, "the process ended before it answered (exit code 0)", "os._exit(0)"),
    "crashes": (0, "the process ended before it answered (exit code -11)", "os.kill(os.getpid(), signal.SIGSEGV)"),
    "torch_takes_8_gb": (0, "can't allocate memory", f"big = torch.ones(2**31)\nreturn {RIGHT}"),
    "python_takes_8_gb": (0, "raised MemoryError", f"big = bytearray(8 * 2**30)\nreturn {RIGHT}"),
    "always_equal": (
        0,
        "xt should be a plain tensor; a value of type AlwaysEqual came",
        """
        class AlwaysEqual:
            def __eq__(self, other): return True
            __ge__ = __le__ = __eq__
            def __getattr__(self, name): return lambda *a, **k: True
        return AlwaysEqual()
        """,
    ),
    "tensor_subclass": (
        0,
        "xt should be a plain tensor; a value of type Agrees came",
        """
        class Agrees(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None): return True
        return torch.zeros_like(x0).as_subclass(Agrees)
        """,
    ),
    "array_instead": (0, "a value of type ndarray came", f"return ({RIGHT}).numpy()"),
    "changes_its_input": (0, "it changed its input x0", f"xt = {RIGHT}\nx0.mul_(2)\nreturn xt"),
    "zeroes_what_it_is_compared_with": (0, "changed its input x0", "for a in (x0, t, eps): a.zero_()\nreturn x0"),
    "pickled": (0, "a value of type Payload came", "return Payload()"),
    "pickled_in_the_error": (0, "raised Bad", "class Bad(Exception, Payload): pass\nraise Bad('x')"),
    "connects": (
        0,
        "raised ConnectionRefusedError",
        f"socket.create_connection(('127.0.0.1', PORT), 1)\nreturn {RIGHT}",
    ),
    "fills_a_file": (0, "File too large", f"open('/tmp/big', 'wb').write(bytes(2**30))\nreturn {RIGHT}"),
    "fills_the_disk": (
        0,
        "No space left on device",
        "for n in range(16):\n    with open(f'/tmp/part{n}', 'wb', 0) as file: file.write(bytes(2**26))",
    ),
    "answers_80_mb": (
        0,
        "the process ended before it answered|no answer within",
        "return torch.zeros(10 * 2**20, dtype=torch.float64)",
    ),
    "answers_4_tb": (0, "the process ended before it answered", "return torch.zeros(1).expand(10**12)"),
    "closes_everything": (0, "the process ended before it answered", f"os.closerange(0, 256)\nreturn {RIGHT}"),
    "raises_what_has_no_text": (
        0,
        "the process ended before it answered",
        "class Mute(Exception):\n    def __str__(self): raise self\nraise Mute",
    ),
    "raises_no_exception": (0, "the process ended before it answered", "class Odd(BaseException): pass\nraise Odd"),
    "leaves_a_thread": (5, "✓ right", f"threading.Thread(target=time.sleep, args=(60,)).start()\nreturn {RIGHT}"),
    "leaves_a_child": (5, "✓ right", f"if os.fork() == 0: os.setsid(), time.sleep(60)\nreturn {RIGHT}"),
    "calls_the_kernel": (0, "it calls paths.GaussianPath.perturb", "return Straight().perturb(x0, t, eps)"),
    "calls_an_alias": (0, "it calls paths.GaussianPath.perturb", "return alias(Straight(), x0, t, eps)"),
    "calls_by_getattr": (
        0,
        "it calls paths.GaussianPath.perturb",
        "return getattr(Straight(), 'per' + 'turb')(x0, t, eps)",
    ),
    "calls_and_hides_it": (
        0,
        "it calls paths.GaussianPath.perturb",
        f"try: return Straight().perturb(x0, t, eps)\nexcept Exception: return {RIGHT}",
    ),
}
# Replies of a form that no honest runner sends, written into the pipe by the function itself.
DEEP = "[" * 500 + "]" * 500
REPLIES = {
    "a list": "[]",
    "a number": "7",
    "nothing": "null",
    "a text": '"answers"',
    "no answers": '{"answers": []}',
    "too few answers": '{"answers": [{"value": {"tensor": 0}, "inputs": {"list": []}}]}',
    "answers in a dict": '{"answers": {"value": 1, "inputs": 2}}',
    "answers that are texts": '{"answers": ["raised", "raised"]}',
    "answers that are lists": '{"answers": [["raised"], ["raised"]]}',
    "no such array": '{"answers": [{"value": {"tensor": 9}, "inputs": {"list": []}}] }',
    "a number out of range": '{"answers": [{"value": {"float": "0x1p99999"}, "inputs": {"list": []}}, {}]}',
    "deep": f'{{"answers": [{{"value": {DEEP}, "inputs": {DEEP}}}, {{}}]}}',
    "called a number": '{"called": 5, "answers": []}',
    "called a dict": '{"called": {"x": 1}, "answers": []}',
    "called something deep": f'{{"called": {DEEP}}}',
}
TELL = """
from dgm_course.paths import GaussianPath, Straight
alias = GaussianPath.perturb
figure = Straight().perturb(torch.ones(1, 2), torch.ones(1) / 2, torch.zeros(1, 2))  # here it is allowed

def tell(header):
    frame = sys._getframe()
    while "writable" not in frame.f_locals:
        frame = frame.f_back
    header = ('{"form": %s, "arrays": []}' % header).encode()
    os.write(frame.f_locals["writable"], struct.pack(">II", 4 + len(header), len(header)) + header)
    os._exit(0)
"""


def reply_name(label: str) -> str:
    return "reply_" + label.replace(" ", "_")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """One submission with all these functions: its entries by name, the host's listener and a file not to be made."""
    pwned = tmp_path_factory.mktemp("host") / "pwned"
    replies = {reply_name(label): f"tell({json.dumps(form)})" for label, form in REPLIES.items()}
    bodies = {name: body for name, (_, _, body) in FUNCTIONS.items()} | replies
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        start = f"PORT, PWNED = {listener.getsockname()[1]}, {str(pwned)!r}\n{PICKLE}"
        functions = [function(body, name) for name, body in bodies.items()]
        result = graded(start, TELL, *functions, names=[*bodies, "renamed"], seconds=20, each=3)
        try:
            connected = bool(listener.accept())
        except TimeoutError:
            connected = False
    entries = {entry["name"]: entry for entry in result["exercises"]}
    return {"entries": entries, "connected": connected, "pwned": pwned, "result": result}


@needs_walls
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gets_its_fair_score_and_a_reason(many, name):
    score, reason, _ = FUNCTIONS[name]
    entry = many["entries"][name]
    assert entry["score"] == score and any(one in entry["message"] for one in reason.split("|")), entry["message"]
    assert [test["score"] for test in entry["tests"]] in ([2, 2, 1], [0, 0, 0])


@needs_walls
@pytest.mark.parametrize("label", REPLIES)
def test_a_reply_of_another_form_is_no_answer(many, label):
    entry = many["entries"][reply_name(label)]
    assert entry["score"] == 0 and entry["message"] == "✗ the reply was malformed"


@needs_walls
def test_a_renamed_function_is_missed_by_its_name(many):
    assert many["entries"]["renamed"]["message"].startswith("✗ the notebook defines no function renamed")
    result = graded(function(f"return {RIGHT}", "blend_"))
    assert result["score"] == 0 and "defines no function blend; there is blend_" in reasons(result)


@needs_walls
def test_no_network_and_no_code_in_the_grader(many):
    assert not many["connected"], "a submission reached the host's network"
    assert not many["pwned"].exists(), "code of a submission ran outside of the sandbox"
    assert many["result"]["problem"] is None


# Attacks of a whole notebook ------------------------------------------------------------------------------------------

CELLS = {
    # name: (score, a part of the reason, cells)
    "endless cell": (0, "not finish within 2 seconds; the time ran out in code cell 3", [GOOD, "while True: pass"]),
    "sys.exit": (0, "xt[", [BAD, "sys.exit(0)"]),
    "os._exit": (0, "the notebook's process ended by itself (exit code 0)", [GOOD, "os._exit(0)"]),
    "patches comparisons": (
        0,
        "xt[",
        [
            """
            yes = lambda *a, **k: True
            torch.allclose = torch.equal = torch.isclose = torch.testing.assert_close = yes
            numpy.allclose = numpy.array_equal = numpy.testing.assert_allclose = yes
            torch.Tensor.__eq__ = torch.Tensor.allclose = torch.Tensor.equal = yes
            import dgm_course.homework.verdict as verdict, dgm_course.homework as homework
            verdict.judge = homework.judge = verdict.close = verdict.differs = lambda *a: None
            """,
            BAD,
        ],
    ),
    "edits the checks": (
        0,
        "xt[",
        [
            BAD,
            """
            import dgm_course.homework as hw
            hw.Homework.check = lambda self, f: print("✓ blend: right in all 2 visible cases") or True
            assert hw.Homework.check(None, blend)
            """,
        ],
    ),
    "prints 100 MB": (5, "✓ right", [GOOD, "for _ in range(100): print('x' * 10**6)"]),
    "rebinds print and stdout": (
        5,
        "✓ right",
        ["print = None; sys.stdout = None", GOOD, "1 / 0", "import builtins; builtins.print = None; sys.stderr = 3"],
    ),
    "closes stdout, raises what has no text": (
        5,
        "✓ right",
        [
            "sys.stdout.close()",
            "class Mute(Exception):\n    def __str__(self): raise self\n",
            GOOD,
            "raise Mute",
            "os.close(1); os.close(2)",
        ],
    ),
    "closes all descriptors": (0, "the notebook", [GOOD, "os.closerange(0, 256)"]),
    "kills its parent": (
        0,
        "the notebook's process ended by itself",
        [GOOD, "os.kill(os.getppid(), 9); time.sleep(9)"],
    ),
    "kills all": (0, "the notebook's process ended by itself", [GOOD, "os.kill(-1, 9)"]),
    "function kills the runner": (
        0,
        "the notebook's process ended by itself",
        [function(f"os.kill(os.getppid(), 9)\ntime.sleep(9)\nreturn {RIGHT}")],
    ),
    "leaves a daemon and threads": (
        5,
        "✓ right",
        [
            GOOD,
            "for _ in 'ab': threading.Thread(target=time.sleep, args=(600,)).start()",
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)",
        ],
    ),
    "fork bomb": (
        0,
        "not finish within 2 seconds",
        [GOOD, "while True:\n    try: os.fork() or os.setsid()\n    except OSError: pass"],
    ),
    "stops itself": (0, "the time ran out in code cell 3", [GOOD, "os.kill(os.getpid(), signal.SIGSTOP)"]),
}


@needs_walls
@pytest.mark.parametrize("name", CELLS)
def test_a_notebook_gets_its_fair_score_and_a_reason(name):
    score, reason, cells = CELLS[name]
    result = graded(*cells, seconds=2)
    assert result["score"] == score and reason in reasons(result), reasons(result)
    assert len(result["output"]) < 25_000  # bytes of 100 MB, the rest is dropped


@needs_walls
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"cells": [\n{"cell_type": ', "its JSON is broken in line 2"),
        (b"[" * 100_000, "it has no list of cells"),
        (b'{"cells": 7}', "it has no list of cells"),
        (b'{"cells": [{"cell_type": "code", "source": 7}]}', "it has no list of cells"),
        (b"\xff\xfe\x00", "it is no text in UTF-8"),
        (notebook("x = '\ud800'", "raise ValueError(chr(0xd800))"), "defines no function blend"),
    ],
)
def test_a_broken_file_is_worth_nothing_and_says_why(content, reason):
    result = graded(content=content)
    assert result["score"] == 0 and reason in reasons(result), reasons(result)


# What a submission can see and write -----------------------------------------------------------------------------------

SPY = """
WANTED = re.compile(rb"SE[C]RET[0-9a-f]{16}")

def look(place, data):
    for found in WANTED.findall(data):
        print("FOUND", place, found, flush=True)

def files(top):
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in SKIPPED]
        yield from (os.path.join(folder, name) for name in names)

def see_files():
    print("FOUND folder", [place for place in PLACES if os.path.exists(place)])
    for place in files("/"):
        if "hwX" in place or "/hidden/" in place and place.endswith(".py") and "site-packages" not in place:
            print("FOUND name", place)
        if os.path.isfile(place) and os.path.getsize(place) < 2**22:
            with open(place, "rb") as file: look(place, file.read())

def see_processes():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in "environ", "cmdline", "mountinfo", "maps":
            try: look((pid, name), open(f"/proc/{pid}/{name}", "rb").read())
            except OSError: pass
        for place in PLACES:
            if os.path.exists(f"/proc/{pid}/root{place}") or os.path.exists(f"/proc/{pid}/cwd/..{place}"):
                print("FOUND root", pid, place, flush=True)
        for fd in range(64):
            try:
                look((pid, fd), os.readlink(f"/proc/{pid}/fd/{fd}").encode())
                if os.path.isfile(f"/proc/{pid}/fd/{fd}"): look((pid, fd), open(f"/proc/{pid}/fd/{fd}", "rb").read())
            except OSError: pass

def see_memory():
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    for line in open("/proc/self/maps"):
        if " rw" in line:
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            while start < end:
                try: piece = os.pread(memory, min(end - start, 2**24), start)
                except OSError: break
                look("memory", piece)
                start += max(1, len(piece))

def see_objects(right):
    frame = sys._getframe()
    while frame:
        if "expected" in str(frame.f_locals): print("FOUND frame", frame, flush=True)
        frame = frame.f_back
    for thing in gc.get_objects():
        if type(thing) is dict and "expected" in thing and "inputs" in thing: print("FOUND case", thing, flush=True)
        if type(thing) in (torch.Tensor, numpy.ndarray) and thing is not right and thing.shape == right.shape:
            if (torch.as_tensor(thing) - right).abs().max() < 1e-6: print("FOUND value", thing, flush=True)
"""
LOOK = function(f"""
if len(x0) == 1:  # the last case of all
    see_files(); see_processes(); see_memory(); see_objects({RIGHT})
    print("looked everywhere", flush=True)
return torch.zeros_like(x0)
""")


@needs_walls
def test_the_hidden_tests_are_nowhere_in_the_sandbox():
    folders = [ROOT / name for name in ("tests", "solutions", "pyproject.toml", ".git", "notebooks")]
    skipped = ["/proc", "/sys", "/usr", *{sys.prefix, sys.base_prefix}]
    start = f"PLACES, SKIPPED = {[str(f) for f in folders]!r}, {skipped!r}\n"
    result = graded(start + SPY, LOOK, each=20)
    assert "looked everywhere" in result["output"], result["exercises"][0]["tests"][-1]["message"]
    found = [line for line in result["output"].splitlines() if "FOUND" in line]
    assert found == ["FOUND folder []"] and result["score"] == 0
    assert result["problem"] is None and not result["cells"]


FORGE = """
forged = json.dumps({"student": "mallory", "score": 5, "max_score": 5, "tests": [{"name": "all", "score": 5}]})
names = ["results.json", "gradebook.csv", "mallory.json", "result.json", "junit.xml", "run.json"]
writable = [folder for folder, _, _ in os.walk("/") if not folder.startswith("/proc") and os.access(folder, os.W_OK)]
print("writable:", json.dumps(writable), flush=True)
for folder in [*writable, *TARGETS]:
    try: os.makedirs(folder, exist_ok=True)
    except OSError: pass
    for name in names:
        try: open(os.path.join(folder, name), "w").write(forged)
        except OSError: pass
for folder in TARGETS:
    os.system(f"rm -rf '{folder}'/* ; chmod -R 777 '{folder}' ; echo forged > '{folder}/gradebook.csv'")
os.system("rm -rf /course 2>/dev/null")
"""


@needs_walls
def test_grades_and_other_students_files_are_out_of_reach():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own has walls too: here everybody may write
        nothing_is_written(Path(folder))


def nothing_is_written(top: Path):
    out = top / "grades"
    for name in ("gradebook.csv", "run.json", "results/ada.json", "feedback/ada.html"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"the real {name}")
    for path in (top, *top.rglob("*")):
        path.chmod(0o777)
    before = {file: file.read_bytes() for file in sorted(top.rglob("*")) if file.is_file()}
    package = {file: file.stat().st_mtime_ns for file in (ROOT / "dgm_course").rglob("*.py")}
    targets = [str(out), str(out / "results"), str(ROOT), str(ROOT / "dgm_course"), "/course/dgm_course", sys.prefix]
    result = graded(BAD, f"TARGETS = {targets!r}\n{FORGE}")
    assert result["score"] == 0 and "xt[" in reasons(result)
    assert {file: file.read_bytes() for file in sorted(top.rglob("*")) if file.is_file()} == before
    assert {file: file.stat().st_mtime_ns for file in package} == package
    (line,) = (line for line in result["output"].splitlines() if line.startswith("writable:"))
    roots = {"/".join(folder.split("/")[:3]) for folder in json.loads(line.removeprefix("writable:"))}
    assert roots and all(root.startswith("/tmp") or root == "/dev/shm" for root in roots), roots


@needs_walls
def test_the_walls_stand():
    result = graded(
        GOOD,
        """
        status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
        libc = ctypes.CDLL(None, use_errno=True)
        if not (child := os.fork()):  # a process with threads may not make one anyway
            os._exit(libc.unshare(0x10000000) != 0)
        walls = {
            "uid": os.getuid(), "capabilities": [status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")],
            "no new rights": status["NoNewPrivs"], "user namespace": os.waitpid(child, 0)[1] >> 8,
            "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), "host": socket.gethostname(),
            "networks": [name for _, name in socket.if_nameindex()], "names": sorted(os.environ),
            "user": [os.environ[name] for name in ("HOME", "USER")],
        }
        print(json.dumps(walls))
        """,
    )
    walls = json.loads(result["output"])
    assert walls["uid"] not in (0, os.getuid()) or os.getuid() != 0
    assert all(int(bits, 16) == 0 for bits in walls["capabilities"]) and walls["no new rights"] == "1"
    assert walls["user namespace"] == 1 and walls["mount"] == -1
    assert walls["networks"] == ["lo"] and walls["host"] == "sandbox" != socket.gethostname()
    assert walls["user"] == ["/tmp", "student"] and result["score"] == 5
    assert set(walls["names"]) - set(sandbox.ENV) <= {
        "PYTHONPATH",
        "PWD",
        "COLUMNS",
        "LINES",
        "KMP_INIT_AT_FORK",
        "KMP_DUPLICATE_LIB_OK",
        "PAGER",
        "GIT_PAGER",
        "CLICOLOR",
        "TERM",
        "LC_CTYPE",
        "OLDPWD",
        "SHLVL",
        "_",
    }


# Attacks on the pipe ---------------------------------------------------------------------------------------------------

WIRE = """
def send(data):
    while data: data = data[os.write(int(sys.argv[2]), data):]

def frame(header, rest=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">II", 4 + len(header) + len(rest), len(header)) + header + rest

def form(value, *blobs):
    return frame({"form": value, "arrays": [len(blob) for blob in blobs]}, b"".join(blobs))

def npy(header, data=b""):
    return b"\\x93NUMPY\\x01\\x00" + struct.pack("<H", len(header)) + header.encode() + data

import pickle
class Payload:
    def __reduce__(self): return (os.system, (f"touch {PWNED}",))
"""
HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': (%s,)}"
PROTOCOL = {
    # name: (a part of the reason, what is written on the pipe while the cells are executed)
    "no object": ("a malformed message", "send(frame([1, 2]))"),
    "lengths that do not add up": ("do not add up", "send(frame({'form': 1, 'arrays': [99]}))"),
    "a header longer than all": ("a malformed message", "send(struct.pack('>II', 8, 2**32 - 1) + b'{}{}')"),
    "4 GB": ("a message of 4294967295 bytes is announced", "send(b'\\xff' * 100)"),
    "10 MB of JSON": ("a header of 10000026 bytes is announced", "send(frame({'form': 'x' * 10**7, 'arrays': []}))"),
    "deep JSON": ("a malformed message", "send(frame(b'[' * 10**6))"),
    "objects": (
        "an array of dtype object",
        f"send(form(1, npy({HEADER % ('|O', 1)!r}, pickle.dumps([Payload()]))))",
    ),
    "10**12 numbers": (
        "an array of shape (1000000000000,) has 4 bytes",
        f"send(form(1, npy({HEADER % ('<f4', 10**12)!r}, bytes(4))))",
    ),
    "half an array": ("a malformed message", "send(form(1, npy(\"{'descr': (\")))"),
    "silence": ("did not finish within 2 seconds", "send(form({'failed': []})[:-3]); time.sleep(60)"),
    "a frame that swallows others": ("did not finish within 2 seconds", "send(struct.pack('>I', 9999))"),
    "endless frames": (
        "did not finish within 2 seconds",
        "data = form({'cell': 10**4300 - 1}) * 100\nwhile True: send(data)",
    ),
    "the end too early": ("malformed|before it was asked", "send(form({'failed': []}))"),
    "an end of another form": ("malformed|before it was asked", "send(form({'failed': {'cell': 1}}))"),
    "faults of other forms": (
        "malformed|before it was asked",
        "send(form({'failed': [7, {'cell': 10**400}, {'cell': -1, 'error': {}}] + [0] * 10**6}))",
    ),
    "answers too early": (
        "sent a reply before it was asked|it changed its input",  # noticed, or taken for answers if they come a little later
        "answer = {'value': {'tensor': 0}, 'inputs': {'list': [{'tensor': 0}] * 3}}\n"
        f"blobs = [npy({HEADER % ('<f4', '2, 3')!r}, bytes(24))]\n"
        "for _ in range(4): send(form({'answers': [answer, answer]}, *blobs))",
    ),
    "the runner's clock stopped": (
        "the notebook's process no longer answered while blend was tried",
        "import select\nselect.select = lambda fds, *a: (fds, [], [])\ndef blend(*a):\n    while True: pass",
    ),
}


@needs_walls
@pytest.mark.parametrize("name", PROTOCOL)
def test_what_no_honest_runner_sends_is_worth_nothing(name, tmp_path):
    reason, cell = PROTOCOL[name]
    result = graded(f"PWNED = {str(tmp_path / 'pwned')!r}\n{WIRE}", GOOD, cell, "x = 1", seconds=2, each=0.5)
    assert result["score"] == 0 and any(one in reasons(result) for one in reason.split("|")), reasons(result)
    assert len(result["cells"]) <= 5 and not (tmp_path / "pwned").exists()


@needs_walls
def test_replies_out_of_step_give_nobody_more():
    extra = function(f"send(form({{'answers': []}}))\nreturn {RIGHT}")
    late = [GOOD.replace("blend", name) for name in ("second", "third")]
    result = graded(WIRE, extra, *late, names=("blend", "second", "third"))
    assert [entry["score"] for entry in result["exercises"]][0] == 0 and result["score"] < 15
    assert all(entry["score"] == 5 or entry["message"].startswith("✗ ") for entry in result["exercises"])


@needs_walls
def test_the_visible_cases_by_heart_are_worth_nothing():
    exercise = parse(homework("blend").text, "hwX")["blend"]
    known = {
        f"{case['inputs']['x0'][0, 0]:.5f}": case["expected"]["value"].tolist()
        for case in exercise.cases("like the visible cases", 2026)  # those that students have
    }
    body = f"return torch.tensor({known!r}.get(f'{{x0[0, 0]:.5f}}', x0.tolist()))"
    result = graded(function(body))
    assert result["score"] == 0 and "xt[" in reasons(result), reasons(result)


@pytest.fixture
def pipes():
    """A session whose other ends are held here, as a hostile submission holds them: requests to read, replies to write."""
    (requests_end, requests), (replies, replies_end) = os.pipe(), os.pipe()
    process = subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE)
    yield Session(process, requests, replies), requests_end, replies_end
    process.kill()
    process.wait()
    process.stdout.close()
    for end in (requests_end, requests, replies, replies_end):
        os.close(end)


def test_a_submission_that_is_faster_at_the_pipe_does_not_stop_the_grader(pipes):
    """It can open the other ends too, under /proc: read a reply before the grader does, fill the pipe of requests."""
    session, _, _ = pipes
    session.read()
    session.listen()
    assert session.received == session.printed == b""
    big = memoryview(bytes(2**20))
    rest = session.write(big)
    assert 0 < len(rest) < len(big) and session.write(rest) == rest


def test_a_reply_that_comes_before_the_request_is_never_taken_for_its_reply(pipes):
    session, _, replies_end = pipes
    os.write(replies_end, wire.frame({"answers": []}, []))
    with pytest.raises(Broken, match="before it was asked"):
        session.ask("?", [], 10)


def test_replies_are_read_in_pieces_of_any_size(pipes):
    session, requests_end, replies_end = pipes
    sent = wire.frame({"x": [1, "é"]}, [np.arange(3.0)]) + wire.frame(7, [])

    def answer():
        asked.append(os.read(requests_end, 1000))
        for byte in sent:
            os.write(replies_end, bytes([byte]))

    asked = []
    threading.Thread(target=answer).start()
    form, (array,) = session.ask("?", [], 10)
    assert form == {"x": [1, "é"]} and array.tolist() == [0, 1, 2] and session.next(10) == (7, [])
    assert wire.unpack(asked[0][4:]) == ("?", [])
    os.write(replies_end, struct.pack(">I", wire.LONGEST + 1))
    with pytest.raises(Broken, match=f"{wire.LONGEST + 1} bytes is announced; at most {wire.LONGEST}"):
        session.next(10)


# The form of a message -------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    -3,
    0.1,
    math.inf,
    "ᾱ",
    [1, (2.5, "x")],
    torch.arange(6).reshape(2, 3),
    torch.zeros(0, 3, dtype=torch.float16),
    torch.tensor(2.5, dtype=torch.float64),
    (torch.tensor([True, False]), torch.ones(2, 2).T),
]


def alike(a, b) -> bool:
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and (a.dtype == b.dtype and torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_message_comes_out_as_it_went_in(value):
    arrays = []
    form = encode(value, arrays)
    data = wire.frame(form, arrays)
    assert wire.length(data[:4]) == len(data) - 4
    assert alike(decode(*wire.unpack(data[4:]), tensor=lambda a: torch.tensor(a)), value)


def mutated(data: bytes, source: random.Random) -> bytes:
    """The data with one to three places changed, cut out, doubled or filled with what may matter."""
    data = bytearray(data)
    for _ in range(source.randint(1, 3)):
        at, n = source.randrange(len(data)), source.choice([1, 1, 2, 4, 30])
        nasty = [
            b"",
            bytes(source.randbytes(n)),
            b"[" * n,
            b"{",
            b"(",
            b"}",
            b"'",
            b"9" * n,
            b"\xff" * n,
            b"\n",
            b"|O",
            b"-",
        ]
        data[at : at + source.choice([0, 1, n])] = source.choice([*nasty, bytes(data[at : at + n]) * 2])
        data = data or bytearray(1)
    return bytes(data)


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # of some odd headers NumPy thinks that Python 2 wrote them
def test_no_message_does_more_than_a_value_error():
    source, valid = random.Random(5), []
    for value in VALUES:
        arrays = []
        form = encode(value, arrays)
        valid.append(wire.frame(form, arrays)[4:])
    read = 0
    for number in range(4000):
        try:
            form, arrays = wire.unpack(mutated(valid[number % len(valid)], source))
            read += 1
            decode(form, arrays, tensor=lambda a: a)
        except (ValueError, OverflowError):
            continue
    assert 100 < read < 3000  # some still are messages, many are none


NASTY = [
    None,
    True,
    -1,
    10**30,
    "raised",
    "\ud800",
    [],
    {},
    [[]],
    {"x": 1},
    {"tensor": 0},
    {"tensor": 5},
    {"tensor": -1},
]
NASTY += [
    {"float": "nan"},
    {"float": "0x1p99999"},
    {"float": "x"},
    {"tuple": []},
    {"list": [1]},
    {"affine": [1, 2]},
    {"other": "x"},
]
NASTY += [
    {"tuple": [{"tensor": 0}]},
    {"raised": "ValueError"},
    {"raised": [], "line": 10**30},
    json.loads(DEEP),
    {"called": "y"},
]


def spoilt(form, source: random.Random):
    """The JSON value with a part of it exchanged for another."""
    if not isinstance(form, (dict, list)) or not form or source.random() < 0.15:
        return source.choice(NASTY)
    if isinstance(form, list):
        at = source.randrange(len(form))
        return [*form[:at], spoilt(form[at], source), *form[at + 1 :]]
    key = source.choice(sorted(form))
    kept = {name: value for name, value in form.items() if name != key}
    return {**kept, source.choice([key, key, key, "raised", "value"]): spoilt(form[key], source)}


def test_no_reply_makes_the_judge_stumble():
    tests = homework("blend")
    exercise, groups = tests.exercises["blend"], tests.cases()["blend"]
    cases, _ = groups["like the visible cases"]
    arrays, answers = [], []
    for case in cases:
        inputs = [encode(value, arrays) for value in case["inputs"].values()]
        answers.append({"value": encode(case["expected"]["value"], arrays), "inputs": {"list": inputs}})
    honest, source = {"answers": answers, "called": []}, random.Random(6)
    understood = grading.understand(honest, arrays, cases, "blend")
    assert grading.score(exercise, groups, {"like the visible cases": understood})["score"] == 2
    scores = []
    for _ in range(3000):
        answers = grading.understand(spoilt(honest, source), arrays, cases, "blend")
        answers = "late" if answers is LATE else answers
        scores.append(grading.score(exercise, groups, {"like the visible cases": answers})["score"])
    assert set(scores) <= {0, 2} and scores.count(0) > 2000


# Where there is no sandbox ---------------------------------------------------------------------------------------------


def test_without_a_sandbox_nothing_is_graded_unless_it_is_trusted(monkeypatch):
    monkeypatch.setattr(run, "level", lambda: "none")
    with pytest.raises(run.Untrusted, match=r"bubblewrap does not work.*'none'.*--trust"):
        graded(GOOD)


def reachable() -> str | None:
    """Why level "user" cannot be tried here, or None."""
    if os.geteuid() != 0:
        return "only root can become another user"
    with sandbox.sandboxed("user") as (prefix, where):
        try:
            done = subprocess.run([*prefix, sys.executable, "-c", "import torch"], capture_output=True, **where)
        except OSError as error:
            return f"another user cannot be made: {error}"
    return "another user cannot reach this Python or its packages" if done.returncode else None


@pytest.mark.parametrize("level", ["none", "user"])
def test_trusted_submissions_are_graded_right_without_walls(level, monkeypatch):
    if level == "user" and (problem := reachable()):
        pytest.skip(problem)
    monkeypatch.setattr(run, "level", lambda: level)
    cell = "import resource; print(resource.getrlimit(resource.RLIMIT_NPROC)[0], os.getuid())"
    bodies = [GOOD, BAD.replace("blend", "bad"), function("while True: pass", "endless")]
    result = graded(cell, *bodies, names=("blend", "bad", "endless"), each=1, trust=True)
    assert [entry["score"] for entry in result["exercises"]] == [5, 0, 0] and result["isolation"] == level
    processes, uid = map(int, result["output"].split()[:2])
    if level == "none":  # the instructor's own processes count too: there is no limit that is safe
        assert processes == resource.RLIM_INFINITY or processes == resource.getrlimit(resource.RLIMIT_NPROC)[0]
        assert uid == os.getuid()
    else:
        assert processes == 64 and uid not in (0, os.getuid())
