"""A driver of Ray to be killed.

python tests/support/stub_ray.py RUN_FOLDER N: runs what is not committed; after N answers it tells which addresses its
processes listen on, and kills itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import sys
from pathlib import Path

from stub_scale import FINDER

from md3cli.config import ScaleOptions
from md3cli.scale import shard_runner
from md3cli.scale.folder import open_run_folder
from md3cli.scale.plan import read_plan
from md3cli.scale.ray import RayDriver, ShardAnswer
from md3cli.scale.workers import ShardQueue


def drive(uri: str, kill_after: int) -> None:
    """Be a driver until so many shards are told, and then no more."""
    folder = open_run_folder(uri)
    plan = read_plan(folder)
    assert plan is not None
    answers: list[ShardAnswer] = []

    class DyingDriver(RayDriver):
        def take(self, answer: ShardAnswer) -> None:
            super().take(answer)
            answers.append(answer)
            if len(answers) == kill_after:
                os.write(sys.__stdout__.fileno(), "\n".join(listening()).encode())
                os.kill(os.getpid(), signal.SIGKILL)

    shard_runner.FINDER = FINDER
    queue = ShardQueue(folder, plan.shards)
    DyingDriver(folder, plan, queue, ScaleOptions(workers_per_device=2), "cpu").run(lambda: None)


def listening() -> set[str]:
    """The addresses that this process and its descendants listen on."""
    sockets = {inode for pid in descendants(os.getpid()) for inode in sockets_of(pid)}
    tables = [Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    entries = [line.split() for table in tables for line in table]
    return {address_of(entry[1].partition(":")[0]) for entry in entries if entry[3] == "0A" and entry[9] in sockets}


def descendants(pid: int) -> list[int]:
    found = [pid]
    for task in entries(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # a thread that has ended by now
            for child in (task / "children").read_text().split():
                found += descendants(int(child))
    return found


def sockets_of(pid: int) -> set[str]:
    found = set()
    for link in entries(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed by now
            found.add(os.readlink(link))
    return {link[len("socket:[") : -1] for link in found if link.startswith("socket:[")}


def entries(folder: str) -> list[Path]:
    """What is in a folder of /proc; nothing where its process has ended: Ray's come and go while this looks."""
    with contextlib.suppress(OSError):
        return list(Path(folder).iterdir())
    return []


def address_of(words: str) -> str:
    """An address as /proc/net/tcp has it: 32-bit words, each in the byte order of the machine."""
    data = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    return str(ipaddress.ip_address(data))


if __name__ == "__main__":
    drive(sys.argv[1], int(sys.argv[2]))
