"""Addresses: joined, confined, shown."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.remote.address import (
    folder_of,
    has_userinfo,
    host_of,
    is_address,
    is_within,
    join,
    named_hosts,
    shown,
    shown_argument,
    shown_name,
    suffix_of,
)

SIGNED = "https://b.s3.amazonaws.com/a/x.jpg?X-Amz-Algorithm=AWS4&X-Amz-Credential=AK&id=7&X-Amz-Signature=0f3"


@pytest.mark.parametrize(
    "text", ["s3://b/k", "HTTPS://h/x", "gs://b", "hf://datasets/a/b@main/x.png", "http://[::1]/x"]
)
def test_what_is_an_address(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize("text", ["http://[::1", "http://[::1/a/x.jpg", "https://a]b/x.tar"])
def test_half_a_pair_of_brackets_is_no_host(text: str) -> None:
    assert (host_of(text), suffix_of(text), named_hosts([text])) == ("", "", ("",))
    assert not is_within(text, "http://h")


@pytest.mark.parametrize("text", ["", "a/b.jpg", "s3:/b", "file:///etc/passwd", "ftp://h/x", "x s3://b", "memory://a"])
def test_what_is_none(text: str) -> None:
    assert not is_address(text)
    assert shown(text) == text


@pytest.mark.parametrize(
    ("address", "suffix"),
    [("https://h/a.JPG?v=x.csv", ".jpg"), ("s3://b/a.b/c", ""), ("s3://bucket.tar", ""), ("s3://b/q?.png", ".png")],
)
def test_the_suffix_is_of_the_path(address: str, suffix: str) -> None:
    assert suffix_of(address) == suffix


@pytest.mark.parametrize(
    ("folder", "relative", "joined"),
    [
        ("https://h/d", "a b/x.jpg", "https://h/d/a b/x.jpg"),
        ("https://h/d", "../x.jpg?w=1", "https://h/x.jpg?w=1"),
        ("https://h/d", "../../../x.jpg", "https://h/x.jpg"),
        ("https://h/d", "/x.jpg", "https://h/x.jpg"),
        ("https://h/d", "//evil.org/x.jpg", "https://h/evil.org/x.jpg"),
        ("https://h/d", "file:x.jpg", "https://h/d/file:x.jpg"),
        ("https://h/d", "a#1.jpg", "https://h/d/a%231.jpg"),
        ("s3://b/d/e", "../x?#%.jpg", "s3://b/d/x?#%.jpg"),
        ("s3://b/d", "../../../x.jpg", "s3://b/x.jpg"),
        ("s3://b/d", "/x.jpg", "s3://b/x.jpg"),
        ("s3://b", "./x.jpg", "s3://b/x.jpg"),
    ],
)
def test_relative_paths_are_joined(folder: str, relative: str, joined: str) -> None:
    assert join(folder, relative) == joined


@given(st.sampled_from(["s3://b/d", "https://h/d", "gs://b", "http://h:8000/a/b"]), st.text(max_size=30))
def test_joining_never_changes_the_host(folder: str, relative: str) -> None:
    try:
        joined = join(folder, relative)
    except ValueError:
        return
    assert is_address(joined)
    assert host_of(joined) == host_of(folder)


def test_folders_of_addresses() -> None:
    assert folder_of("https://h/a/m.csv?x=a/b") == "https://h/a"
    assert folder_of("s3://b/m.csv") == folder_of("s3://b") == "s3://b"


@pytest.mark.parametrize(
    ("address", "folder", "inside"),
    [
        ("s3://b/p/x.jpg", "s3://b/p", True),
        ("s3://b/p/x.jpg", "s3://b/p/", True),
        ("s3://b/pp/x.jpg", "s3://b/p", False),
        ("s3://c/p/x.jpg", "s3://b/p", False),
        ("s3://b/p/../x.jpg", "s3://b/p", False),
        ("https://h/p/x.jpg?a=/../", "https://h/p", True),
        ("https://H:443/p/x.jpg", "https://h/p", True),
        ("https://h:444/p/x.jpg", "https://h/p", False),
        ("http://h/p/x.jpg", "https://h/p", False),
        ("https://h/p/%2e%2E/x.jpg", "https://h/p", False),
        ("https://h/p/..%2fx.jpg", "https://h/p", False),
        ("https://h/p%5C..%5Cx.jpg", "https://h/p", False),
        ("https://h.evil.org/p/x.jpg", "https://h/p", False),
        ("https://h@evil.org/p/x.jpg", "https://h/p", False),
        ("https://h:x/p/x.jpg", "https://h/p", False),
    ],
)
def test_confinement(address: str, folder: str, inside: bool) -> None:
    assert is_within(address, folder) is inside


def test_nothing_shown_lets_a_reader_in() -> None:
    assert shown(SIGNED) == "https://b.s3.amazonaws.com/a/x.jpg?id=7"
    assert shown("https://me:secret@h/x.jpg#top") == "https://h/x.jpg"
    assert re.fullmatch(r"https://h/x\.jpg\?token=~[0-9a-f]{16}", shown("https://h/x.jpg?token=abc"))
    assert re.fullmatch(r"https://h/x\.jpg\?%74oken=~[0-9a-f]{16}&v=2", shown("https://h/x.jpg?%74oken=abc&v=2"))
    assert "s3cret" not in shown("https://h/x.jpg?v=1;key=s3cret&X-Amz-Credential=s3cret&sig=s3cret")
    assert shown("s3://key:secret@b/x.jpg") == "s3://b/x.jpg"
    assert shown("hf://datasets/a/b@main/x.png") == "hf://datasets/a/b@main/x.png"
    assert shown_argument("--root=https://u:p@h/d") == "--root=https://h/d"
    assert shown_argument("what is https?") == "what is https?"


SIGNINGS = [
    "X-Amz-Algorithm=A{0}&X-Amz-Credential=C{0}&X-Amz-Date={0}&X-Amz-Expires=9&X-Amz-SignedHeaders=h&X-Amz-Signature={0}",
    "X-Amz-Signature={0}&X-Amz-Credential=C{0}&X-Amz-Security-Token=T{0}",
    "X-Goog-Algorithm=A&X-Goog-Credential=C{0}&X-Goog-Date={0}&X-Goog-Expires=9&X-Goog-SignedHeaders=h&X-Goog-Signature={0}",
    "AWSAccessKeyId=A{0}&Signature={0}&Expires={0}",
    "GoogleAccessId=A{0}&Signature={0}&Expires={0}",
    "Expires={0}&Signature=S{0}&Key-Pair-Id=K{0}",
    "Policy={0}&Signature=S{0}&Key-Pair-Id=K{0}",
    "sv=2024&st={0}&se={0}&sr=b&sp=r&sig=S{0}",
    "hdnts=st={0}~exp={0}~acl=/*~hmac={0}",
]


@pytest.mark.parametrize("signing", SIGNINGS)
def test_a_picture_signed_anew_keeps_its_name(signing: str) -> None:
    for query in ("{}", "id=7&{}", "{}&id=7", "id=7&{}&w=1"):
        first, second = (shown(f"https://h/x.jpg?{query.format(signing.format(k))}") for k in ("11", "22"))
        plain = query.replace("&{}", "").replace("{}&", "").replace("{}", "")
        assert first == second == (f"https://h/x.jpg?{plain}" if plain else "https://h/x.jpg")


SECRETS = ["key", "session", "policy", "expires", "auth", "token", "sig", "signature", "X-Amz-Signature", "Key-Pair-Id"]


@pytest.mark.parametrize("parameter", [*SECRETS, "id", "x-amz-meta-x", "X-Goog-Credential", "AWSAccessKeyId"])
def test_pictures_that_differ_in_one_parameter_have_two_names(parameter: str) -> None:
    names = {shown(f"https://h/d?{parameter}={value}") for value in ("00.png", "03.png", "00.png ", "")}
    names |= {shown(f"https://h/e?{parameter}=00.png"), shown(f"https://h/d?a=1&{parameter}=00.png")}
    assert len(names) == 6
    complete = SIGNINGS[0].format("11")  # beside a whole signature, other parameters still tell pictures apart
    assert len({shown(f"https://h/d?{complete}&picture={k}&key={k}") for k in range(3)}) == 3


def test_what_another_user_gets_has_another_name() -> None:
    one, other = (shown_name(f"https://{user}:s3cret@h/x.jpg") for user in ("me", "you"))
    assert one != other
    assert "s3cret" not in one
    assert "me" not in one.partition("#")[0]
    assert shown_name("https://h/x.jpg") == "https://h/x.jpg"


@given(st.text(st.sampled_from("ab=&;?.%k"), max_size=12), st.text(st.sampled_from("ab=&;?.%k"), max_size=12))
def test_two_queries_without_a_signature_are_two_names(one: str, other: str) -> None:
    if one != other:
        assert shown(f"https://h/x?{one}") != shown(f"https://h/x?{other}")


def test_userinfo_and_hosts() -> None:
    assert has_userinfo("s3://key:secret@b/x")
    assert not has_userinfo("https://h/a@b.jpg")
    assert named_hosts(["https://H:8000/x", "photos", "s3://b/x", "http://h/y"]) == ("h",)
