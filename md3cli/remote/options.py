"""What a run says about fetching; knows of no store, so that it costs nothing where nothing is fetched."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from md3cli.errors import MissingExtraError
from md3cli.remote.address import scheme_of
from md3cli.remote.patience import Retries
from md3cli.remote.zones import HostRules

DEFAULT_TIMEOUT_S = 30.0
_MODULES = {
    "http": ("fsspec", "aiohttp"),
    "https": ("fsspec", "aiohttp"),
    "s3": ("fsspec", "aiohttp", "s3fs"),
    "gs": ("fsspec", "aiohttp", "gcsfs"),
    "hf": ("fsspec", "aiohttp", "huggingface_hub"),
}


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """`limit_bytes` a file, `timeout_s` an attempt (see `Patience`), whom to speak to, how often to try."""

    limit_bytes: int = 2**30
    timeout_s: float = DEFAULT_TIMEOUT_S
    rules: HostRules = field(default_factory=HostRules)
    retries: Retries = field(default_factory=Retries)


def require_extra(address: str) -> None:
    """Raise MissingExtraError where what this kind of address needs is not installed."""
    scheme = scheme_of(address)
    if not all(map(is_installed, _MODULES[scheme])):
        raise MissingExtraError(f"a path with {scheme}://", "remote")


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported."""
    return importlib.util.find_spec(module) is not None
