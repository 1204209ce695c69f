"""Which hosts may be spoken to."""

from __future__ import annotations

import pytest

from md3cli.remote.hosts import HostRules, Zone, zone_of


@pytest.mark.parametrize(
    ("host", "zone"),
    [
        ("93.184.216.34", Zone.PUBLIC),
        ("2606:4700::1111", Zone.PUBLIC),
        ("[2606:4700::1111]", Zone.PUBLIC),
        ("127.0.0.1", Zone.PRIVATE),
        ("127.9.9.9", Zone.PRIVATE),
        ("0.0.0.0", Zone.PRIVATE),
        ("10.1.2.3", Zone.PRIVATE),
        ("172.16.0.1", Zone.PRIVATE),
        ("192.168.0.1", Zone.PRIVATE),
        ("100.64.0.1", Zone.PRIVATE),
        ("224.0.0.1", Zone.PRIVATE),
        ("::1", Zone.PRIVATE),
        ("fd00::1", Zone.PRIVATE),
        ("::ffff:10.0.0.1", Zone.PRIVATE),
        ("64:ff9b::7f00:1", Zone.PRIVATE),
        ("2002:7f00:1::", Zone.PRIVATE),
        ("169.254.169.254", Zone.FORBIDDEN),
        ("::ffff:169.254.169.254", Zone.FORBIDDEN),
        ("fe80::1%eth0", Zone.FORBIDDEN),
        ("fd00:ec2::254", Zone.FORBIDDEN),
        ("fd00:ec2::23", Zone.FORBIDDEN),
        ("fd20:ce::254", Zone.FORBIDDEN),
        ("168.63.129.16", Zone.FORBIDDEN),
        ("::ffff:168.63.129.16", Zone.FORBIDDEN),
        ("100.100.100.200", Zone.FORBIDDEN),
        ("example.org", None),
        ("127.1", None),  # the resolver knows such forms, and its answer is looked at
    ],
)
def test_zones(host: str, zone: Zone | None) -> None:
    assert zone_of(host) is zone


def test_private_hosts_must_be_named() -> None:
    assert HostRules().farthest("10.0.0.1") is Zone.PUBLIC
    assert HostRules(frozenset({"10.0.0.1"})).farthest("10.0.0.1") is Zone.PRIVATE
    assert HostRules(frozenset({"10.0.0.1"})).farthest("10.0.0.2") is Zone.PUBLIC
    assert HostRules(any_private=True).farthest("10.0.0.2") is Zone.PRIVATE


def test_a_public_server_does_not_send_on_into_a_private_network() -> None:
    rules = HostRules(frozenset({"named.lan"}), any_private=True)
    assert rules.farthest_after("10.0.0.2", sender=Zone.PUBLIC) is Zone.PUBLIC
    assert rules.farthest_after("10.0.0.2", sender=Zone.PRIVATE) is Zone.PRIVATE
    assert rules.farthest_after("named.lan", sender=Zone.PUBLIC) is Zone.PRIVATE
