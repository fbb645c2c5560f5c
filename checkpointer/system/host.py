"""The name of this host, as locks and attempts record it."""

from __future__ import annotations

import functools
import os
import socket
import uuid


def host_name() -> str:
    """Its name, asked anew: a process may outlive it. Where the system gives none, a name that no other host has.

    Two hosts that both were called "unknown" would take one another's processes for dead ones of their own.
    """
    try:
        name = socket.gethostname()
    except OSError:  # seen in sandboxes that forbid the call
        name = os.uname().nodename if hasattr(os, "uname") else ""
    return name or _made_up()


@functools.cache
def _made_up() -> str:
    return f"unnamed-{uuid.getnode():012x}"
