"""Which hosts may be spoken to, so that a manifest of unknown origin cannot point into the user's own network.

*Public* addresses may always be fetched. *Private* addresses (loopback, the ranges of local networks, whatever else is
not routed in public) may be fetched where the user has named the host, as INPUT or --root, or where --remote allows
all URLs of a manifest. A server may send on to a private address only if it is private itself. *Forbidden* addresses
may never be fetched: the link-local ones, where clouds keep the credentials of their machines, and a few others. A name
is judged when it is resolved, so that the address which is connected to is the one that was judged.

Imports no store and no client: `require_extra` says whether they are installed before anything imports them.
"""

from __future__ import annotations

import importlib.util
import ipaddress
from dataclasses import dataclass, field
from enum import IntEnum

from md3cli.errors import MissingExtraError
from md3cli.remote.address import is_within, scheme_of
from md3cli.remote.retry import Retries

_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            "fd00:ec2::254",  # Amazon EC2
            "fd00:ec2::23",  # Amazon EKS, pod identities
            "fd20:ce::254",  # Google Cloud, machines with IPv6 alone
            "168.63.129.16",  # Azure's host; the range is a public one
            "100.100.100.200",  # Alibaba Cloud
            "192.0.0.192",  # Oracle Cloud
        ),
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Zone(IntEnum):
    """How close to home an address is."""

    PUBLIC, PRIVATE, FORBIDDEN = range(3)


def zone_of(host: str) -> Zone | None:
    """Return the zone of an IP address that is written out; None for a name."""
    try:
        ip = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside is not None:
            ip = inside
    if ip.is_link_local or ip in _METADATA:
        return Zone.FORBIDDEN
    return Zone.PUBLIC if ip.is_global and not ip.is_multicast else Zone.PRIVATE


@dataclass(frozen=True, slots=True)
class HostRules:
    """Whose private addresses may be spoken to: those of `named` hosts, or with `any_private` of all.

    `root` is an address that pictures may not leave, as --root says; empty allows everything.
    """

    named: frozenset[str] = frozenset()
    any_private: bool = False
    root: str = ""

    def may_send_to(self, address: str) -> bool:
        """Return whether a server may send on to `address`, also from http to https."""
        safe = self.root.startswith("http:") and address.startswith("https:")
        return not self.root or is_within(address.replace("https:", "http:", 1) if safe else address, self.root)

    def farthest(self, host: str) -> Zone:
        """Return the zone up to which `host` may lie."""
        return Zone.PRIVATE if self.any_private or host in self.named else Zone.PUBLIC

    def farthest_after(self, host: str, sender: Zone) -> Zone:
        """Return the zone up to which `host` may lie where a server in the zone `sender` sends on to it."""
        return self.farthest(host) if host in self.named else min(self.farthest(host), sender)


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
    """How to fetch: bytes of a file, seconds of an attempt (see `Patience`), from which hosts, how often to try."""

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
    """Return whether a top-level module can be imported."""
    return importlib.util.find_spec(module) is not None
