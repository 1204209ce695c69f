"""Addresses: what is one, how relative paths are joined to it, and what of it may be shown. Pure.

An address stays text, as it was typed. An `http(s)` address is a URL with all its rules; of an `s3 gs hf` address
everything behind `://` is a bucket and a key, taken literally.

What may be shown is decided here and nowhere else. `shown` drops whatever lets its reader in: the user and
password before an `@`, and the parameters that sign a query. It drops these only where one of the known
signatures is complete, so that a picture keeps its name, and its record's id, when the address is signed anew.
Of any other parameter that sounds like a secret (`key`, `session`) it replaces the value by a digest, because the
value may be all that tells two pictures apart.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from md3cli.errors import UsageError
from md3cli.records import printable

OUTPUT_SCHEMES = ("s3", "gs")  # those whose stores put an object only where there is none
_ADDRESS = re.compile(r"(https?|s3|gs|hf)://", re.IGNORECASE)
_SECRET_PARAMETERS = frozenset(
    {"signature", "sig", "hmac", "hdnts", "hdnea", "policy", "key-pair-id", "awsaccesskeyid", "googleaccessid"}
    | {"token", "access_token", "auth", "authorization", "credential", "key", "api_key", "apikey", "api-key", "jwt"}
    | {"password", "passwd", "pwd", "secret", "client_secret", "session", "sessionid", "session_id"}
    | {"auth_token", "id_token", "refresh_token", "ossaccesskeyid", "x-api-key"}
)
_SECRET_PREFIXES = ("x-amz-", "x-goog-", "x-oss-", "x-cos-")
_AZURE_OTHERS = frozenset(
    {"se", "st", "sp", "sr", "si", "ss", "srt", "spr", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv"}
    | {"saoid", "suoid", "scid", "sdd", "ses"}
)
_SIGNED_HEADERS = ("algorithm", "credential", "date", "expires", "signedheaders", "signature", "security-token")


class _Signature(NamedTuple):
    """How a service signs a query: the parameters that must all be there, and those that go with them."""

    needed: frozenset[str]
    others: frozenset[str] = frozenset()


_SIGNATURES = (
    *(  # Amazon S3 and Google Cloud Storage, version 4 of their signatures
        _Signature(frozenset({f"{x}signature", f"{x}credential"}), frozenset(f"{x}{name}" for name in _SIGNED_HEADERS))
        for x in ("x-amz-", "x-goog-")
    ),
    _Signature(  # Alibaba Cloud OSS, version 4
        frozenset({"x-oss-signature", "x-oss-credential"}),
        frozenset({"x-oss-signature-version", "x-oss-date", "x-oss-expires", "x-oss-security-token"}),
    ),
    *(  # the same three, older
        _Signature(frozenset({"signature", "expires", key}), frozenset({"x-amz-security-token", "security-token"}))
        for key in ("awsaccesskeyid", "googleaccessid", "ossaccesskeyid")
    ),
    *(  # Amazon CloudFront
        _Signature(frozenset({"signature", "key-pair-id", until}), frozenset({"hash-algorithm", "expires", "policy"}))
        for until in ("expires", "policy")
    ),
    _Signature(frozenset({"signature", "keyname", "expires"})),  # Google Cloud CDN
    *(  # Azure: shared access signatures
        _Signature(frozenset({"sig", "sv", until}), _AZURE_OTHERS) for until in ("se", "si")
    ),
    _Signature(  # Tencent Cloud COS
        frozenset({"q-signature", "q-ak", "q-sign-time"}),
        frozenset({"q-sign-algorithm", "q-key-time", "q-header-list", "q-url-param-list", "x-cos-security-token"}),
    ),
)
_AKAMAI_NAMES = frozenset({"hdnts", "hdnea", "__token__"})
_AKAMAI_TOKEN = re.compile(r"(?=.*exp=)(?=.*hmac=)")  # a whole signature in one parameter
_DIGEST_CHARS = 16  # of hex: among ten million addresses two are alike once in 300,000 runs
_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")


def scheme_of(text: str) -> str:
    """Return the scheme of an address in lower case; empty where `text` is none."""
    match = _ADDRESS.match(text)
    return match[1].lower() if match else ""


def is_address(text: str) -> bool:
    """Return whether `text` is an address that can be fetched, rather than a path."""
    return ":" in text and _ADDRESS.match(text) is not None


def is_web(address: str) -> bool:
    """Return whether an address is http or https."""
    return scheme_of(address) in ("http", "https")


def path_of(address: str) -> str:
    """Return the path of an address, without host and query; suffix and folders are read from it."""
    if is_web(address):
        try:
            return urlsplit(address).path
        except ValueError:  # half a pair of brackets: no host, and so no path
            return ""
    return "/" + address.partition("://")[2].partition("/")[2]


def suffix_of(address: str) -> str:
    """Return the suffix of an address in lower case, such as `.jpg`; empty where there is none."""
    return os.path.splitext(path_of(address))[1].lower()


def host_of(address: str) -> str:
    """Return the host of a web address, or the bucket, in lower case; empty where it has none that can be read."""
    if is_web(address):
        try:
            return (urlsplit(address).hostname or "").lower()
        except ValueError:  # half a pair of brackets
            return ""
    return address.partition("://")[2].partition("/")[0]


def named_hosts(typed: Iterable[str]) -> tuple[str, ...]:
    """Return the hosts of the web addresses among what the user typed, each once."""
    return tuple(dict.fromkeys(host_of(text) for text in typed if is_web(text)))


def has_userinfo(address: str) -> bool:
    """Return whether a user or a password stands before the host; behind `hf://` an `@` names a revision."""
    return scheme_of(address) != "hf" and _USERINFO.search(address) is not None


# -- joining -------------------------------------------------------------------------------------


def folder_of(address: str) -> str:
    """Return the folder that an address lies in, without a slash at its end and without query."""
    bare = re.split("[?#]", address, maxsplit=1)[0] if is_web(address) else address
    head, _, rest = bare.partition("://")
    return f"{head}://{rest.rpartition('/')[0] or rest}"


def join(folder: str, relative: str) -> str:
    """Return the address of a path relative to `folder`; a path with a slash in front starts at the host or bucket.

    The result is never at another host or bucket, however many `..` there are. A web path is taken as a link on a
    page would be: `?` starts a query, percent signs are escapes. But `#` is part of the name.
    """
    if is_web(folder):
        reference = relative.replace("#", "%23")
        reference = f"./{reference}" if ":" in reference.partition("/")[0] else reference  # else taken for a scheme
        return urljoin(folder.rstrip("/") + "/", re.sub("^/+", "/", reference))
    scheme, _, rest = folder.partition("://")
    bucket, _, key = rest.partition("/")
    parts = [part for part in key.split("/") if part] if not relative.startswith("/") else []
    for part in relative.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join([f"{scheme}://{bucket}", *parts])


def is_within(address: str, folder: str) -> bool:
    """Return whether an address lies in `folder` or below it, whatever `..` it holds, escaped or not."""
    if (scheme_of(address), _place_of(address)) != (scheme_of(folder), _place_of(folder)):
        return False
    wanted, found = _parts_of(folder), _parts_of(address)
    return ".." not in found and found[: len(wanted)] == wanted


def _place_of(address: str) -> object:
    if not is_web(address):
        return host_of(address)
    try:
        return host_of(address), urlsplit(address).port or {"http": 80, "https": 443}[scheme_of(address)]
    except ValueError:
        return None


def _parts_of(address: str) -> list[str]:
    path = unquote(path_of(address)).replace("\\", "/") if is_web(address) else path_of(address)
    return [part for part in path.split("/") if part not in ("", ".")]


# -- OUTPUT --------------------------------------------------------------------------------------


def checked_output_address(typed: str) -> str:
    """Return an address that can be written to, without a slash at its end.

    Raises:
        UsageError: nothing can be written there.
    """
    bare = printable(shown(typed))
    if scheme_of(typed) not in OUTPUT_SCHEMES:
        raise UsageError(f"{bare} cannot be written; OUTPUT is a path on this machine, or in a bucket: s3:// or gs://")
    if has_userinfo(typed):
        raise UsageError(f"{bare}: credentials do not belong in an address; set them as AWS_* or so")
    if not host_of(typed):
        raise UsageError(f"{bare} names no bucket; write it like s3://BUCKET/FOLDER")
    return f"{scheme_of(typed)}://{typed.partition('://')[2].rstrip('/')}"


# -- showing -------------------------------------------------------------------------------------


def shown(address: str) -> str:
    """Return an address as records, messages and logs may show it: nothing in it lets its reader in. A path stays."""
    if not is_address(address):
        return address
    if not is_web(address):
        return _USERINFO.sub("", address) if has_userinfo(address) else address
    bare, question, query = _USERINFO.sub("", address).partition("#")[0].partition("?")
    if not question:
        return bare
    parts = re.split("([&;])", query)  # parameters, and what stands between them
    signing = _signing_parameters(parts[::2])
    kept = [
        (between, _without_secret(part, bare))
        for between, part in zip(["", *parts[1::2]], parts[::2], strict=True)
        if _parameter_name(part) not in signing
    ]
    return f"{bare}?{''.join(map(''.join, kept))[len(kept[0][0]) :]}" if kept else bare


def shown_name(address: str) -> str:
    """Return the name of the picture at an address: as `shown`, with a digest of the user, who may get another one."""
    if not has_userinfo(address):
        return shown(address)
    user = _USERINFO.search(address)
    return f"{shown(address)}#user={_digest(user[0] if user else '')}"


def _signing_parameters(parts: Iterable[str]) -> set[str]:
    """Return the names of the parameters that only sign a query: of each service whose signature is complete."""
    names = {_parameter_name(part) for part in parts}
    tokens = {_parameter_name(part) for part in parts if _AKAMAI_TOKEN.match(unquote(part.partition("=")[2]))}
    signing = tokens & _AKAMAI_NAMES
    for signature in _SIGNATURES:
        if signature.needed <= names:
            signing |= signature.needed | signature.others
    return signing


def _parameter_name(parameter: str) -> str:
    return unquote(parameter.partition("=")[0]).lower()


def _without_secret(parameter: str, bare: str) -> str:
    """Return a parameter, with a digest in the place of a value that may be a secret."""
    name, equals, value = parameter.partition("=")
    plain = _parameter_name(parameter)
    is_secret = plain in _SECRET_PARAMETERS or plain.startswith(_SECRET_PREFIXES)
    return f"{name}={_digest(bare, plain, value)}" if is_secret and equals and value else parameter


def _digest(*texts: str) -> str:
    data = "\n".join(texts).encode("utf-8", "surrogateescape")
    return "~" + hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]


def shown_argument(argument: str) -> str:
    """Return an argument of the command line as run.json may keep it."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--") and is_address(value):
        return f"{option}={shown(value)}"
    return shown(argument) if is_address(argument) else argument
