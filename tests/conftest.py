"""Fixtures that the whole suite shares: run roots on every kind of storage."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import logging
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("no-times", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no-times")  # how long a draw takes says how busy the machine is

# Torch is not imported yet. Tests fork, and OpenMP that has run several threads hangs in a fork's first parallel loop.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYsecretKEY"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="every crash point and variant, not a sample of them")

    parser.addoption("--without-torch", action="store_true", help="no torch is there: skip each test that needs it")


class NeedsTorch:
    """Skips the test, or the file, that imports torch where there is none."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "torch":
            pytest.skip("needs torch", allow_module_level=True)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-torch"):
        if importlib.util.find_spec("torch"):
            raise pytest.UsageError("--without-torch, but torch is there")
        sys.meta_path.insert(0, NeedsTorch())  # type: ignore[arg-type]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, but with ``--thorough``, the parameters that a test's mark ``thorough`` calls variants of others."""
    if config.getoption("--thorough"):
        return
    variant = pytest.mark.skip(reason="a variant of a case that runs: only with --thorough")
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        for mark in item.iter_markers("thorough"):
            (is_variant,) = mark.args
            if is_variant(*(parameters[name] for name in inspect.signature(is_variant).parameters)):
                item.add_marker(variant)


@pytest.fixture
def stride(request: pytest.FixtureRequest) -> int:
    """Of how many crash points one is tried. The sample differs from scenario to scenario, not from run to run."""
    return 1 if request.config.getoption("--thorough") else 4


@dataclass(frozen=True)
class Root:
    """A run root of its own, and what opens it."""

    kind: str
    url: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class S3Server:
    """A real S3 server on a free port of this machine."""

    endpoint: str
    options: dict[str, Any]
    """``storage_options`` of a run root on it."""

    def new_bucket(self) -> str:
        """The name of an empty bucket."""
        name = f"runs-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """A client that knows nothing of what fsspec does."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.options["key"],
            aws_secret_access_key=self.options["secret"],
            region_name="us-east-1",
        )

    def buckets(self) -> list[str]:
        """The names of all buckets."""
        return [bucket["Name"] for bucket in self.client().list_buckets()["Buckets"]]

    def keys(self, bucket: str) -> list[str]:
        """Every key of a bucket, in order."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3 server for all tests of this process."""
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class KeepsConnections(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    # moto's own server looks for its services in the file system at each request; this one has S3 alone.
    server = make_server("127.0.0.1", 0, create_backend_app("s3"), threaded=True, request_handler=KeepsConnections)
    server.daemon_threads = True  # those of connections that clients have not closed
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    options = {"key": "AKIAIOSFODNNEXAMPLE", "secret": SECRET, "client_kwargs": {"endpoint_url": endpoint}}
    yield S3Server(endpoint, options)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(s3_server: S3Server) -> Root:
    """A run root in an empty bucket."""
    return Root("s3", f"s3://{s3_server.new_bucket()}/run", s3_server.options)


_numbers = itertools.count()


@pytest.fixture
def memory() -> Iterator[Root]:
    """A run root in this process's memory."""
    from fsspec.implementations.memory import MemoryFileSystem

    name = f"run-{next(_numbers)}-{secrets.token_hex(4)}"
    yield Root("memory", f"memory://{name}")
    for path in [path for path in MemoryFileSystem.store if path.startswith(f"/{name}/")]:
        del MemoryFileSystem.store[path]
    MemoryFileSystem.pseudo_dirs[:] = [path for path in MemoryFileSystem.pseudo_dirs if not path.startswith(f"/{name}")]


@pytest.fixture
def local(tmp_path: Path) -> Root:
    """A run root on the local file system; its directory does not exist yet."""
    return Root("local", str(tmp_path / "run"))


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest) -> Root:
    """A run root on each kind of storage in turn."""
    made: Root = request.getfixturevalue(request.param)
    return made


@pytest.fixture(params=["memory", "s3"])
def object_root(request: pytest.FixtureRequest) -> Root:
    """A run root on each storage without rename."""
    made: Root = request.getfixturevalue(request.param)
    return made
