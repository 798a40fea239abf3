"""Loaded by every Python process that a test starts: no connection leaves this machine."""

import ipaddress
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
    if host in (None, "", "localhost", b"localhost", "0.0.0.0", "::"):
        return
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        if ipaddress.ip_address(name.partition("%")[0]).is_loopback:
            return
    except ValueError:
        pass
    raise OSError(f"tests have no network: {event} {name}")


sys.addaudithook(refuse_outside)
