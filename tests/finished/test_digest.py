"""Ids as digests, and the set that remembers millions of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from md3cli.finished.digest import DigestSet, digest_of


@given(st.lists(st.binary(min_size=1, max_size=2)))
def test_a_digest_set_is_a_set(tails: list[bytes]) -> None:
    ours, plain = DigestSet(), set()
    for tail in tails:
        digest = (tail * 16)[:16]  # few first bytes, and matches across neighbours in a bucket
        assert ours.add(digest) == (digest not in plain)
        plain.add(digest)
        assert digest in ours
        assert (b"other" + digest)[:16] not in ours
    assert len(ours) == len(plain)


def test_any_text_has_a_digest() -> None:
    assert digest_of("00" * 16) == bytes(16)
    assert len({digest_of(text) for text in ("", "ab", "ab" * 17, "ü", "\ud800")}) == 5
