"""Loaded by every Python process that a test starts: no connection leaves this machine."""

import re
import sys
from typing import Any


def refuse_outside(event: str, args: tuple[Any, ...]) -> None:
    """Refuse to look up or connect to anything but the loopback addresses."""
    if event == "socket.connect":
        host = args[1][0] if isinstance(args[1], tuple) else None  # a path: a Unix socket
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host or "localhost"
    if not re.fullmatch(r"localhost|0\.0\.0\.0|::1?(%\w+)?|127(\.\d+){3}", name):
        raise OSError(f"tests have no network: {event} {name}")


sys.addaudithook(refuse_outside)
