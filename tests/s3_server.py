"""Storage that speaks S3, on this machine, behind a proxy that lets some requests fail, or all of them for a while."""

import http.client
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Proxy(ThreadingHTTPServer):
    """What goes wrong, and how often."""

    daemon_threads = True
    target: tuple[str, int]
    failing = 0.0  # share of the requests: half of them answered 500, half cut off in the middle
    outage_at, outage_seconds = 10**9, 10.0  # the request with which an outage begins, and how long nothing answers
    outage_until = 0.0
    requests = failed = 0
    draw = random.Random(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Proxy

    def forward(self) -> None:
        proxy, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy.requests += 1
        if proxy.requests == proxy.outage_at:
            proxy.outage_until = time.monotonic() + proxy.outage_seconds
        drawn, self.close_connection = proxy.draw.random(), True
        if time.monotonic() < proxy.outage_until:
            proxy.failed += 1
            return  # the connection is closed without an answer
        if drawn < proxy.failing / 2:
            proxy.failed += 1
            self.send_error(500)
            return
        connection = http.client.HTTPConnection(*proxy.target)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("server", "date", "connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(content)))
        self.end_headers()
        cut = drawn < proxy.failing
        proxy.failed += cut
        self.wfile.write(content[: len(content) // 2] if cut else content)

    do_GET = do_PUT = do_POST = forward  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """Serve an empty storage, moto's, on free ports of 127.0.0.1."""
    from moto.server import ThreadedMotoServer

    storage = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    storage.start()
    with Proxy(("127.0.0.1", 0), Handler) as proxy:
        proxy.target = storage.get_host_and_port()
        Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        yield proxy
        proxy.shutdown()
    storage.stop()
