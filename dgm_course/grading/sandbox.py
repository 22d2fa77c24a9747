"""Where a submission runs: behind walls, as far as the machine has them.

Level "bubblewrap": namespaces of its own for processes, network and files; it sees the system's programs, the Python
environment and `dgm_course`, all read-only, and a small `/tmp`; it has no capability and an unprivileged user. Level "user":
another user without these walls, which takes root. Level "none": limits on memory, time and processes only.
"""

import contextlib
import functools
import itertools
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dgm_course

__all__ = ["LEVELS", "level", "sandboxed"]

LEVELS = ("bubblewrap", "user", "none")  # the strongest first
TMP = 256 * 2**20  # bytes that a submission may write
COUNTER = itertools.count(secrets.randbelow(4_000))  # another grader on this machine starts elsewhere
ENV = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "USER": "student",
    "LOGNAME": "student",
    "LANG": "C.UTF-8",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "DGM_GRADING": "1",  # the checks in a notebook stay silent
}
# Whether this is no longer root, and sees what the runner needs; a package in a home folder, say, is out of sight.
PROBE = """import importlib.util as util, os, sys
seen = all(map(util.find_spec, ["numpy", "torch", "IPython", "dgm_course.grading.runner"]))
sys.exit(os.geteuid() == 0 or not seen)"""


@functools.cache
def level() -> str:
    """The strongest level that works on this machine; each is tried."""
    for name in LEVELS[:-1]:
        with contextlib.suppress(OSError, subprocess.SubprocessError), sandboxed(name) as (prefix, where):
            probe = [*prefix, sys.executable, "-c", PROBE]
            # In a session of its own: a terminal's Ctrl-C must not make the level look weaker.
            if subprocess.run(probe, capture_output=True, timeout=30, start_new_session=True, **where).returncode == 0:
                return name
    return "none"


@contextlib.contextmanager
def sandboxed(name: str) -> Iterator[tuple[list[str], dict]]:
    """What to put before a command so that it runs at a level, and arguments for `subprocess.Popen`.

    When the block ends, nothing of the sandbox is left: no folder, no process of its user.
    """
    uid = 61_000 + next(COUNTER) % 4_000  # one for each submission: users are counted and killed one by one
    package = Path(dgm_course.__file__).parent
    if name == "bubblewrap":
        yield bubblewrap(uid, package), {"env": {**ENV, "PYTHONPATH": "/course"}, "cwd": "/"}
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        env = {**ENV, "HOME": home, "TMPDIR": home, "PYTHONPATH": str(package.parent)}
        if name == "none":
            yield [], {"env": env, "cwd": home}
            return
        os.chown(home, uid, uid)
        try:
            yield drop(uid), {"env": env, "cwd": home}
        finally:
            kill_all(uid)


def bubblewrap(uid: int, package: Path) -> list[str]:
    """The walls of level "bubblewrap", by root or by a user who may make user namespaces."""
    if not shutil.which("bwrap"):
        raise FileNotFoundError("bwrap is not installed")
    root = os.geteuid() == 0
    walls = "bwrap --die-with-parent --new-session --unshare-pid --unshare-net --unshare-ipc --unshare-uts".split()
    walls += "--unshare-cgroup-try --hostname sandbox --proc /proc --dev /dev".split()
    if not root:
        walls += f"--unshare-user --disable-userns --uid {uid} --gid {uid} --cap-drop ALL".split()
    for folder in ("/tmp", "/dev/shm"):
        walls += f"--perms 1777 --size {TMP} --tmpfs {folder}".split()
    walls += ["--remount-ro", "/dev"]  # else who makes walls without root owns it, and it has no limit
    walls += [*files(package), "--remount-ro", "/", "--chdir", "/tmp"]
    if not root:
        return walls
    # Root makes the walls without a user namespace, for it may read what a home folder hides; then it becomes nobody. A second
    # pair of walls is there only to take away the right to make user namespaces.
    inner = "bwrap --unshare-user --disable-userns --die-with-parent --dev-bind / / --chdir /tmp".split()
    return [*walls, *drop(uid), *inner]


def files(package: Path) -> list[str]:
    """What can be read inside: the system's programs, the Python environment, and the package in /course."""
    words = ["--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/lib", "/lib64", "/sbin"):
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            words += ["--ro-bind", folder, folder]
    words += parents("/etc/fonts")
    for place in ("/etc/fonts", "/etc/ld.so.cache"):
        words += ["--ro-bind-try", place, place]
    for folder in sorted({sys.prefix, sys.base_prefix}):
        words += [*parents(folder), "--ro-bind", folder, folder]
    return [*words, *parents("/course/dgm_course"), "--ro-bind", str(package), "/course/dgm_course"]


def parents(folder: str) -> list[str]:
    """Make the folders above a mount so that everybody may pass through them."""
    return [word for above in reversed(Path(folder).parents[:-1]) for word in ("--perms", "0755", "--dir", str(above))]


def drop(uid: int) -> list[str]:
    """Become a user without rights."""
    ids = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return ["setpriv", *ids, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def kill_all(uid: int) -> None:
    """End every process of a user at once, so that none can fork in the meantime."""
    subprocess.run([*drop(uid), "sh", "-c", "kill -9 -1"], capture_output=True, start_new_session=True)
