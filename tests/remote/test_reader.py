"""One picture over http(s): limits, patience, tries, redirects, whom to speak to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import pytest
from faulty_servers import Fault, WebServer

from md3cli.errors import ImageError, InputError
from md3cli.records import ImageItem
from md3cli.remote.hosts import FetchOptions, HostRules, Zone
from md3cli.remote.retry import ByteBudget, Patience, Retries

pytest.importorskip("aiohttp", reason="needs the extra: pip install 'md3cli[remote]'")
from md3cli.remote import http as web_module
from md3cli.remote.reader import Fetcher
from md3cli.remote.stores import ListedName
from md3cli.source.remote_inputs import MOST_LEVELS, RemoteWalk

QUICK = Retries(first_wait_s=0.01)
PRIVATE = HostRules(any_private=True)
Fetch = Callable[..., bytes]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fetch() -> Iterator[Fetch]:
    fetchers = []

    def fetch_one(address: str, *, offset: int = 0, size: int | None = None, **options: Any) -> bytes:
        budget = ByteBudget(1 << 30)
        options = {"rules": PRIVATE, "retries": QUICK, "timeout_s": 5.0} | options
        fetchers.append(Fetcher(FetchOptions(**options), budget))
        return fetchers[-1].fetch(ImageItem("x", address, offset=offset, size=size), budget.open())

    yield fetch_one
    for fetcher in fetchers:
        fetcher.close()


def failure(fetch: Fetch, address: str, **options: Any) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        fetch(address, **options)
    return caught.value.type, str(caught.value)


def test_the_bytes_as_they_are(web: WebServer, fetch: Fetch) -> None:
    web.files["/a b/ü.png"] = bytes(range(256)) * 4000
    assert fetch(f"{web.url}/a b/ü.png") == fetch(f"{web.url}/a%20b/%C3%BC.png") == web.files["/a b/ü.png"]
    assert fetch(f"{web.url}/a b/ü.png", offset=3, size=5) == bytes(range(3, 8))


@pytest.mark.parametrize(
    ("status", "type", "num_tries"),
    [
        (404, "not_found", 1),
        (410, "not_found", 1),
        (401, "permission", 1),
        (403, "permission", 1),
        (400, "io", 1),
        (451, "io", 1),
        (429, "io", 4),
        (500, "io", 4),
        (503, "io", 4),
    ],
)
def test_what_a_status_means(web: WebServer, fetch: Fetch, status: int, type: str, num_tries: int) -> None:
    web.faults["/x.png"] = Fault(status)
    assert failure(fetch, f"{web.url}/x.png") == (type, f"the server answered {status}")
    assert web.requests["/x.png"] == num_tries


def test_what_passes_is_tried_again(web: WebServer, fetch: Fetch) -> None:
    web.files |= {"/busy.png": b"x" * 1000, "/cut.png": b"y" * 1000}
    web.faults |= {"/busy.png": Fault(503, times=3), "/cut.png": Fault(cut_at=10, times=3)}
    assert fetch(f"{web.url}/busy.png") == b"x" * 1000
    assert fetch(f"{web.url}/cut.png") == b"y" * 1000


@pytest.mark.process
def test_the_server_says_when_to_come_back(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b"x"
    web.faults["/x.png"] = Fault(429, {"Retry-After": "1"}, times=1)
    started = time.monotonic()
    assert fetch(f"{web.url}/x.png") == b"x"
    assert time.monotonic() - started >= 1.0


def test_a_body_that_ends_early_is_no_picture(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b"x" * 1000
    web.faults["/x.png"] = Fault(cut_at=400)
    assert failure(fetch, f"{web.url}/x.png") == ("io", "the connection ended before all 1,000 bytes came")
    assert web.requests["/x.png"] == 4


def test_more_bytes_than_allowed_are_not_read(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b"x" * 10_000_000
    web.faults["/told.png"] = Fault(claims=10**15)
    assert failure(fetch, f"{web.url}/x.png", limit_bytes=5000)[0] == "too_large"
    web.files["/told.png"] = b"x"
    assert failure(fetch, f"{web.url}/told.png")[0] == "too_large"
    assert web.requests == {"/x.png": 1, "/told.png": 1}


def test_a_length_that_is_not_told_does_not_help(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b"x" * 10_000_000
    web.faults["/x.png"] = Fault(claims=-1)
    assert len(fetch(f"{web.url}/x.png")) == 10_000_000
    assert failure(fetch, f"{web.url}/x.png", limit_bytes=5000)[0] == "too_large"


@pytest.mark.process
def test_a_slow_server_is_given_up(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b"x" * 1000
    web.faults["/x.png"] = Fault(pause_s=0.05)
    type, message = failure(fetch, f"{web.url}/x.png", timeout_s=0.4, retries=Retries(num_tries=2, first_wait_s=0.01))
    assert type == "timeout"  # all of it would take 50 s, and be a picture's bytes
    assert "--fetch-timeout" in message


def test_patience_grows_with_what_comes() -> None:
    patience = Patience(0.05)
    patience.came(1 << 20)
    assert 15 < patience.left_s() < 17
    patience.paused(10)
    assert patience.left_s() > 25


def test_an_empty_file(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b""
    assert failure(fetch, f"{web.url}/x.png") == ("empty", "the file is empty (0 bytes)")


def test_a_part_needs_a_server_that_gives_parts(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.tar"] = b"x" * 1000
    assert failure(fetch, f"{web.url}/x.tar", offset=900, size=200) == (
        "io",
        "the connection ended before all 200 bytes came",
    )
    web.has_ranges = False
    assert failure(fetch, f"{web.url}/x.tar", offset=3, size=5)[1].startswith("the server does not give parts")


@pytest.mark.parametrize("address", ["http://", "http://[::1/x", "http:///x.png", "http://h:99999/x.png"])
def test_urls_that_make_no_sense(fetch: Fetch, address: str) -> None:
    assert failure(fetch, address)[0] == "bad_request"


def test_nobody_listens(web: WebServer, fetch: Fetch) -> None:
    assert failure(fetch, "http://127.0.0.1:9/x.png")[0] == "io"


# -- redirects -----------------------------------------------------------------------------------


def send_on(web: WebServer, path: str, to: str, status: int = 302) -> str:
    web.faults[path] = Fault(status, {"Location": to})
    return web.url + path


def test_redirects_are_followed(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b"x"
    assert fetch(send_on(web, "/a", "/x.png", 308)) == b"x"
    assert fetch(send_on(web, "/b", f"{web.url}/a", 301)) == b"x"


def test_but_not_out_of_the_root(web: WebServer, fetch: Fetch) -> None:
    web.files["/d/x.png"] = web.files["/x.png"] = b"x"
    rules = HostRules(frozenset({"127.0.0.1"}), root=f"{web.url}/d")
    assert fetch(send_on(web, "/d/in", "/d/x.png"), rules=rules) == b"x"
    for place, to in enumerate(["/x.png", "../x.png", "/d/%2e%2e/x.png", "http://localhost/d/x.png"]):
        type, message = failure(fetch, send_on(web, f"/d/{place}", to), rules=rules)
        assert (type, "outside of --root" in message) == ("outside_root", True)


def test_https_is_no_other_place_than_http() -> None:
    assert HostRules(root="http://h/d").may_send_to("https://h/d/x.png")
    assert not HostRules(root="http://h/d").may_send_to("https://h/x.png")
    assert not HostRules(root="https://h/d").may_send_to("http://h/d/x.png")


def test_but_not_for_ever(web: WebServer, fetch: Fetch) -> None:
    assert failure(fetch, send_on(web, "/a", "/a")) == ("io", "sent on more than 5 times")
    assert web.requests["/a"] == 6


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "s3://b/x"])
def test_nor_to_other_schemes(web: WebServer, fetch: Fetch, to: str) -> None:
    type, message = failure(fetch, send_on(web, "/a", to))
    assert (type, message.startswith("sent on to a")) == ("bad_request", True)


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "[fd00:ec2::254]"])
def test_link_local_hosts_are_never_spoken_to(web: WebServer, fetch: Fetch, host: str) -> None:
    for address in (f"http://{host}/latest/meta-data", send_on(web, "/a", f"http://{host}/latest/meta-data")):
        type, message = failure(fetch, address, rules=HostRules(frozenset({host.strip("[]")}), any_private=True))
        assert (type, "link-local" in message) == ("bad_request", True)


def test_private_hosts_must_be_named(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b"x"
    type, message = failure(fetch, f"{web.url}/x.png", rules=HostRules())
    assert (type, "--remote allows that" in message) == ("bad_request", True)
    assert failure(fetch, f"{web.url.replace('127.0.0.1', 'localhost')}/x.png", rules=HostRules())[0] == "bad_request"
    assert failure(fetch, f"{web.url.replace('127.0.0.1', '127.1')}/x.png", rules=HostRules())[0] == "bad_request"
    assert not web.requests
    assert fetch(f"{web.url}/x.png", rules=HostRules(frozenset({"127.0.0.1"}))) == b"x"


def test_a_public_server_does_not_lead_inside(web: WebServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 plays the public server, every other address of the loopback a private one."""
    zones = {"127.0.0.1": Zone.PUBLIC}
    monkeypatch.setattr(web_module, "zone_of", lambda host: zones.get(host, Zone.PRIVATE) if host[0] == "1" else None)
    inside = web.url.replace("127.0.0.1", "127.0.0.2")
    assert failure(fetch, send_on(web, "/a", f"{inside}/x.png"))[0] == "bad_request"
    assert failure(fetch, send_on(web, "/a", f"{inside}/x.png"), rules=HostRules())[0] == "bad_request"
    assert failure(fetch, f"{inside}/x.png")[0] == "io", "asked for directly it is spoken to; nobody listens there"


def test_a_name_is_judged_by_all_it_resolves_to(web: WebServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    import aiohttp

    port = int(web.url.rpartition(":")[2])
    found = ["10.0.0.1", "169.254.169.254", "127.0.0.1"]

    async def resolve(self: object, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        facts = {"hostname": host, "port": port, "family": 2, "proto": 0, "flags": 0}
        return [facts | {"host": address} for address in found]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    web.files["/x.png"] = b"x"
    address = f"http://rebinding.example:{port}/x.png"
    assert failure(fetch, address, rules=HostRules())[0] == "bad_request"
    found[:] = ["169.254.169.254"]
    assert failure(fetch, address.replace("rebinding", "metadata"))[1].startswith("the address is link-local")
    found[:] = ["169.254.169.254", "127.0.0.1"]
    assert fetch(address.replace("rebinding", "both")) == b"x"


def test_passwords_go_to_the_host_they_are_for(web: WebServer, fetch: Fetch) -> None:
    web.files["/x.png"] = b"x"
    other = web.url.replace("127.0.0.1", "localhost")
    send_on(web, "/a", f"{other}/x.png")
    assert fetch(f"{web.url.replace('//', '//me:secret@')}/a") == b"x"
    authorized = [(path, "Authorization" in headers) for path, headers in web.log]
    assert authorized == [("/a", True), ("/x.png", False)]
    web.faults["/x.png"] = Fault(403)
    assert "secret" not in failure(fetch, f"{web.url.replace('//', '//me:secret@')}/x.png")[1]


# -- threads -------------------------------------------------------------------------------------


def test_closing_ends_what_is_under_way(web: WebServer) -> None:
    web.files["/x.png"] = b"x" * 1000
    web.faults["/x.png"] = Fault(pause_s=0.2)
    budget = ByteBudget(1 << 20)
    fetcher = Fetcher(FetchOptions(rules=PRIVATE), budget)
    ended = threading.Event()

    def run() -> None:
        try:
            fetcher.fetch(ImageItem("x", f"{web.url}/x.png"), budget.open())
        except CancelledError:
            ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not web.requests["/x.png"]:
        time.sleep(0.01)
    fetcher.close()
    assert ended.wait(60)


def test_the_budget_makes_younger_pictures_wait() -> None:
    budget = ByteBudget(100)
    old, young = budget.open(), budget.open()
    budget.take(young, 80)
    budget.take(old, 500)  # the oldest never waits
    waited: list[float] = []
    thread = threading.Thread(target=lambda: waited.append(budget.take(young, 10)))
    thread.start()
    while not budget._changed._waiters:  # type: ignore[attr-defined]
        time.sleep(0.01)
    time.sleep(0.2)
    assert not waited
    budget.give_back(old)
    thread.join(60)
    assert waited
    assert waited[0] >= 0.15
    assert budget.num_taken == 90
    budget.start_over(young)
    assert budget.num_taken == 0


@pytest.mark.parametrize(
    ("said", "first", "total"),
    [("bytes 5-9/20", 5, 20), ("bytes 5-9/*", 5, None), (f"bytes 0-0/{'9' * 5000}", 0, None), ("", 0, None)],
)
def test_what_a_server_says_of_a_part(said: str, first: int, total: int | None) -> None:
    response: Any = SimpleNamespace(content_length=5, status=206, headers={"Content-Range": said}, content_type="")
    body = web_module.Body(response, calls=None)  # type: ignore[arg-type]
    assert (body.first, body.total) == (first, total)


def test_folders_that_lead_in_a_circle_end() -> None:
    asked: list[str] = []

    def entries(folder: str) -> list[ListedName]:
        asked.append(folder)
        return [ListedName("again", True)]

    reader: Any = SimpleNamespace(entries=entries)
    with pytest.raises(InputError, match=rf"https://h/again/.* more than {MOST_LEVELS} folders deep.*--exclude"):
        list(RemoteWalk(reader=reader).files("https://h"))
    assert len(asked) == MOST_LEVELS + 1
