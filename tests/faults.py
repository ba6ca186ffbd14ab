"""Faults, really injected: flipped bits, cut files, a full disk, a limit on what can be written, killed processes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# A process that has imported everything and forks a child for every order: importing takes longer than a tiny run.
# A child may be told to fill the disk when a stage begins (where this machine lets no test mount one of its own: to
# limit the size of files it writes), or to give up root's power over permissions.
_SERVER = """
import ctypes, json, os, resource, signal, struct, sys
from tests.faults import fill_disk, mount_disk
disk = sys.argv[1] if len(sys.argv) > 1 and mount_disk(sys.argv[1]) else ""
print(disk, flush=True)
from ensemblelora import pipeline
from ensemblelora.workspace import OpenRun
from ensemblelora.cli import main

def leave_no_room():
    fill_disk(disk, 2) if disk else resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))

def obey_permissions():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")

def arm(order):
    if order["obeys"]:
        obey_permissions()
    clear = OpenRun._clear_outcomes
    def clear_and_fill(self, name):
        clear(self, name)
        if name == order["full_in"]:
            leave_no_room()
    OpenRun._clear_outcomes = clear_and_fill

signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        sink = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1), os.dup2(sink, 2)
        arm(order)
        code = main(order["arguments"])
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    if order["waits"]:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    elif sys.stdin.readline():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(eq=False)
class Child:
    """A command at work; its talk goes to a file."""

    server: subprocess.Popen[str]
    pid: int

    def wait(self) -> int:
        """Wait for its end; minus the signal that ended it, if one did."""
        self.server.stdin.write("\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def kill(self, number: int = signal.SIGKILL) -> int:
        os.kill(self.pid, number)
        return self.wait()


@contextmanager
def serving(disk: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that carries out commands of the product in children of its own.

    Args:
        disk: A folder in whose place it sees a small disk of its own; its attribute ``disk`` is where others find that,
            or empty where this machine doesn't let it mount one.
    """
    paths = os.pathsep.join(str(path) for path in (ROOT / "src", ROOT / "scripts", ROOT))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", _SERVER, *([] if disk is None else [str(disk)])]
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        seen = process.stdout.readline().strip()
        process.disk = seen and f"/proc/{process.pid}/root{seen}"
        yield process
        process.stdin.close()


def mount_disk(folder: str, n_bytes: int = 2**24) -> bool:
    """Mount a disk of a few bytes that this process and its children alone see, where the machine allows it."""
    libc, (user, group) = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    new_mounts, new_users, is_private = 0x20000, 0x10000000, 0x44000
    if not sys.platform.startswith("linux"):
        return False
    if libc.unshare(new_mounts):
        if libc.unshare(new_mounts | new_users):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    libc.mount(b"none", b"/", None, is_private, None)
    return libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={n_bytes}".encode()) == 0


def fill_disk(folder: str, n_pages: int) -> None:
    """Write a file ``filler`` that leaves no more room on the disk than some pages of memory."""
    status = os.statvfs(folder)
    with (Path(folder) / "filler").open("xb") as stream:
        os.posix_fallocate(stream.fileno(), 0, status.f_bavail * status.f_frsize - n_pages * resource.getpagesize())


def start(server: subprocess.Popen[str], arguments: list[str], log: Path, **order: Any) -> Child:
    """Begin a command; no other may be begun with this server before it has ended."""
    _send(server, arguments, log, waits=False, **order)
    return Child(server, int(server.stdout.readline()))


def carry_out(server: subprocess.Popen[str], arguments: list[str], log: Path, **order: Any) -> int:
    """Carry out a command to its end, and return its exit code."""
    _send(server, arguments, log, waits=True, **order)
    server.stdout.readline()
    return int(server.stdout.readline())


def _send(server: subprocess.Popen[str], arguments: list[str], log: Path, **order: Any) -> None:
    defaults = {"full_in": None, "obeys": False}
    server.stdin.write(json.dumps({"arguments": arguments, "log": str(log), **defaults, **order}) + "\n")
    server.stdin.flush()


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file, counted from its start, and from its end where negative."""
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_number(path: Path) -> None:
    """Flip one bit of a number in a JSON file, which is as good JSON as before, and says something else."""
    before = path.read_bytes()
    for match in re.finditer(rb"\d(?=,?\n)", before):
        flip_bit(path, 8 * match.start())  # the lowest bit of a digit: another digit
        if json.loads(path.read_bytes()) != json.loads(before):
            return
        path.write_bytes(before)  # the last digit of a long fraction may say nothing
    raise AssertionError(f"{path}: no number")


def cut(path: Path, n_bytes: int = 1) -> None:
    """Cut the end off a file."""
    os.truncate(path, path.stat().st_size - n_bytes)


@contextmanager
def files_limited(n_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: a write fails part of the way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
