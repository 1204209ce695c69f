"""Reaching a Ray cluster, or starting one on this machine; and what a worker gets of it.

A cluster started here listens on the loopback address alone, keeps Ray's token authentication, sends no usage
statistics and writes only below a temporary folder. On a cluster that was there, all this is its owner's choice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from md3cli.errors import EngineError, MissingExtraError, UsageError
from md3cli.records import printable

LOCAL = "local"
OBJECT_STORE_BYTES = 128 * 2**20  # shard numbers and counts; Ray refuses less than 75 MiB
LONGEST_FOLDER = 40  # of the characters a socket's path may have (107), Ray needs the rest
MOST_DECODE_WORKERS = 16
CONNECT_TIMEOUT_S = 10.0
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: nodes are told apart by port, and all ports bind to 127.0.0.1
_AT_IMPORT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else every actor's arguments are called an error
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else whatever still runs when we disconnect starts a Ray of its own
}
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


@dataclass(frozen=True, slots=True)
class Placement:
    """What Ray is asked for: `num_workers` actors on `device`, with CPUs and GPUs for each."""

    num_workers: int
    num_cpus: int
    num_gpus: float
    device: str
    decode_workers: int


def check_installed() -> None:
    """Raises MissingExtraError: Ray Data is not there."""
    if any(importlib.util.find_spec(package) is None for package in ("ray", "pandas")):
        raise MissingExtraError("--engine ray", "ray")


def place(nodes: Sequence[Mapping[str, float]], device: str, per_device: int = 1) -> Placement:
    """Return the workers for a cluster of `nodes` (resources of each, as `ray.nodes` has them).

    `per_device` of them share a GPU, where there are any and `device` allows them, else the cores of a machine.

    Raises:
        EngineError: `device` asks for GPUs and the cluster has none.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device.startswith("cuda") and not with_gpu:
        raise EngineError(f"--device {device}: the Ray cluster has no GPU; leave --device out, or add a node with one")
    if with_gpu and (device == "auto" or device.startswith("cuda")):
        num_gpus = sum(int(node["GPU"]) for node in with_gpu)
        cores = min(int(node.get("CPU", 1) / node["GPU"]) for node in with_gpu)
        return Placement(num_gpus * per_device, 1, 1 / per_device, "cuda", _bounded(cores // per_device))
    cores_of = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    per_device = min(per_device, min(cores_of))
    num_cpus = min(cores_of) // per_device
    return Placement(
        len(cores_of) * per_device, num_cpus, 0.0, "cpu" if device == "auto" else device, _bounded(num_cpus)
    )


def _bounded(num_cores: int) -> int:
    return max(1, min(MOST_DECODE_WORKERS, num_cores))


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Give the module `ray`, connected; a connection that the caller's program had is used and left alone.

    `address` None is the one in RAY_ADDRESS, else a cluster of this machine alone.

    Raises:
        MissingExtraError: Ray is not installed.
        EngineError: there is no such cluster, or none can be started here.
    """
    check_installed()
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    # Ray tells of workers that died on stdout, which is for records; and from a thread of its own.
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(sys.stderr):
        os.environ |= _AT_IMPORT | {name: os.environ[name] for name in _AT_IMPORT if name in os.environ}
        settings = _joining(address) if address != LOCAL else _starting(stack)
        ray = import_module("ray")
        if not ray.is_initialized():
            stack.callback(_shut_down, ray)
            try:
                with _own_sigterm():
                    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
            except Exception as error:  # of many kinds, by what fails
                raise EngineError(_no_connection(address, error)) from error
        yield ray


def _shut_down(ray: Any) -> None:
    """Leave the cluster; a run that is done, or stopped, does not fail of it.

    Ray Data's threads ask the cluster even now, and die of its absence: that is not told.
    """
    tell = threading.excepthook

    def tell_what_matters(died: threading.ExceptHookArgs) -> None:
        if ray.is_initialized() or not isinstance(died.exc_value, ray.exceptions.RaySystemError):
            tell(died)

    threading.excepthook = tell_what_matters
    with contextlib.suppress(Exception):  # of many kinds, such as a raylet that has gone before
        ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Put the program's SIGTERM handler back in place of Ray's, which would end the program at once with status 15.

    Raises:
        EngineError: SIGTERM came meanwhile; the program's own handler has been called.
    """
    handler, is_ended = signal.getsignal(signal.SIGTERM), False
    try:
        yield
    except SystemExit as end:
        is_ended = end.code == signal.SIGTERM and callable(handler)
        if not is_ended:
            raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    if is_ended and callable(handler):
        handler(signal.SIGTERM, None)
        raise EngineError("stopped while Ray was being started")


def _joining(address: str) -> dict[str, Any]:
    """Return the settings to join the cluster at `address`; look for it first, since Ray itself tries for minutes.

    Raises:
        EngineError: nobody answers there.
        UsageError: it is an address of Ray Client, over which Ray Data does not run.
    """
    if address.startswith("ray://"):
        raise UsageError(
            f"{printable(address)}: a driver must run inside the cluster; submit it with `ray job submit`, "
            "or give the address of the head node, like 10.0.0.1:6379"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise EngineError(_no_connection(address, error)) from error
    return {"address": address}


def _starting(stack: contextlib.ExitStack) -> dict[str, Any]:
    """Return the settings to start a cluster here; `stack` removes its folder."""
    os.environ.setdefault(_LOOPBACK, "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = Path(tempfile.mkdtemp(prefix="md3-ray-", dir=_short_folder()))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    if not any(name in os.environ for name in _TOKEN_VARIABLES):
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        stack.callback(os.environ.pop, "RAY_AUTH_TOKEN_PATH", None)
    return {
        "address": LOCAL,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(folder),
    }


def _short_folder() -> str:
    """Return where temporary folders go, unless sockets would get too long a path there."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_FOLDER or os.name == "nt" else "/tmp"


def _no_connection(address: str, error: Exception) -> str:
    reason = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
    if address == LOCAL:
        return f"Ray cannot be started here: {reason}"
    return f"no Ray cluster at {printable(address)}: {reason}; see --ray-address"
