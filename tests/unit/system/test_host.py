"""A host has a name of its own, whatever the system says."""

from __future__ import annotations

import os
import socket
import types
import uuid

import pytest

from checkpointer import CheckpointManager
from checkpointer.environment import environment
from checkpointer.system import host
from checkpointer.system.host import host_name


def refuse():
    raise OSError("Operation not permitted")


def test_it_is_what_the_system_says():
    assert host_name() == socket.gethostname()


@pytest.mark.parametrize("answer", [refuse, lambda: ""])
def test_where_the_system_gives_none_two_hosts_have_different_names(monkeypatch, answer):
    monkeypatch.setattr(socket, "gethostname", answer)
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(nodename=""), raising=False)
    names = []
    for number in (1, 2):
        host._made_up.cache_clear()
        monkeypatch.setattr(uuid, "getnode", lambda number=number: number)
        names.append(host_name())
        assert host_name() == names[-1]
    host._made_up.cache_clear()
    assert names == ["unnamed-000000000001", "unnamed-000000000002"]


@pytest.mark.parametrize("url", ["{}/run", "memory://unnamed-{}"])
def test_a_run_is_saved_and_restored_on_a_host_that_has_no_name(monkeypatch, tmp_path, url):
    monkeypatch.setattr(socket, "gethostname", refuse)
    root = url.format(tmp_path if "memory" not in url else tmp_path.name)
    with CheckpointManager(root, config={"require_resume": False}, progress={"step": 1}) as mgr:
        mgr.save(0)
    with CheckpointManager(root, progress={"step": 0}) as mgr:
        assert mgr.restore_latest() is not None
        mgr.save(1)
    assert environment()["host"] == host_name()
