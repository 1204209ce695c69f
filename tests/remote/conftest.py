"""A web server and an S3 server of this process, with faults to order."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
from faulty_servers import WITHOUT_EXTRA, StoreDoor, WebServer, serving
from program import Program

BUCKET = "pictures"


@pytest.fixture
def md3(md3: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return md3


@pytest.fixture(scope="session")
def _web_server() -> Iterator[WebServer]:
    pytest.importorskip("aiohttp", reason=WITHOUT_EXTRA)
    with serving(WebServer()) as server:
        yield server


@pytest.fixture
def web(_web_server: WebServer) -> WebServer:
    """A web server with nothing on it."""
    _web_server.reset()
    return _web_server


@pytest.fixture(scope="session")
def _store_door() -> Iterator[StoreDoor]:
    pytest.importorskip("s3fs", reason=WITHOUT_EXTRA)
    server_module = pytest.importorskip("moto.server", reason="needs moto and flask, of the extra dev")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    with serving(StoreDoor(port)) as door:
        settings = {
            "AWS_ENDPOINT_URL": door.url,
            "AWS_ACCESS_KEY_ID": "a-key-of-tests",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        yield door
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    moto.stop()


@pytest.fixture(scope="session")
def _store_client(_store_door: StoreDoor) -> Any:
    import boto3

    return boto3.client("s3")


@pytest.fixture
def store(_store_door: StoreDoor, _store_client: Any) -> Iterator[StoreDoor]:
    """An S3 server with one empty bucket, `pictures`."""
    _store_client.create_bucket(Bucket=BUCKET)
    _store_door.reset()
    yield _store_door
    _store_door.reset()
    pages = _store_client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    for key in [found["Key"] for page in pages for found in page.get("Contents", ())]:
        _store_client.delete_object(Bucket=BUCKET, Key=key)
    _store_client.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def put(store: StoreDoor, _store_client: Any) -> Any:
    """Puts bytes at a key of the bucket."""

    def put_object(key: str, data: bytes) -> None:
        _store_client.put_object(Bucket=BUCKET, Key=key, Body=data)

    return put_object
