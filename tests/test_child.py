"""Child interpreters: what they are told, what they say, and that none is left behind."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from md3cli.child import Channel, Child, connect

PATIENCE_S = 60.0


def echo() -> None:
    """Send back every message, and where a message says so print words or end."""
    channel = connect()
    while True:
        message = channel.receive(None)
        if "say" in message:
            os.write(2, message["say"].encode())
        if "end" in message:
            os._exit(message["end"])
        channel.send(message | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")})


ECHO = "test_child:echo"


@pytest.fixture(autouse=True)
def tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


@pytest.mark.process
@pytest.mark.parametrize("may_print", [False, True])
def test_a_child_answers_and_its_last_words_are_kept(may_print: bool) -> None:
    with Child(ECHO, environment={"OMP_NUM_THREADS": "3"}, may_print=may_print) as child:
        child.channel.send({"path": "\udcff"})
        assert child.channel.receive(PATIENCE_S) == {"path": "\udcff", "OMP_NUM_THREADS": "3"}
        assert child.is_alive()
        child.channel.send({"say": "first\nlast words\n", "end": 7})
        with pytest.raises(EOFError):
            child.channel.receive(PATIENCE_S)
        assert child.process.wait(PATIENCE_S) == 7
        assert child.last_words() == "last words"


@pytest.mark.process
def test_a_child_that_may_print_prints_any_number_of_lines() -> None:
    with Child(ECHO, may_print=True) as child:
        for _ in range(3):
            child.channel.send({"say": "much\n" * 20_000})
            child.channel.receive(PATIENCE_S)
        child.kill()
        assert child.last_words() == "much"


@pytest.mark.process
def test_the_end_of_the_context_is_the_end_of_the_child() -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with Child(ECHO) as child:
        assert child.is_alive()
    assert not child.is_alive()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_a_message_over_the_limit_is_no_message() -> None:
    ours, theirs = map(Channel, socket.socketpair())
    ours.send({"text": "x" * 100})
    with pytest.raises(EOFError):
        theirs.receive(10.0, max_bytes=100)
    ours.close()
    theirs.close()


def test_a_message_of_thousands_of_hosts_arrives() -> None:
    """Workers of a run are told over the same wire whom they may speak to, and tell why they end."""
    ours, theirs = map(Channel, socket.socketpair())
    message = {"named_hosts": [f"host-{i}.example.org" for i in range(5000)]}
    sender = threading.Thread(target=ours.send, args=(message,))
    sender.start()
    assert theirs.receive(10.0) == message
    sender.join()
    ours.close()
    theirs.close()
