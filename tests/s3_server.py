"""Storage that speaks S3, on this machine, which lets some requests fail, or all of them for a while."""

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any


class Storage:
    """moto's storage, empty at first, as a WSGI application: what goes wrong with it, and how often."""

    failing = 0.0  # share of the requests: half of them answered 500, half cut off in the middle
    outage_at = 10**9  # the request with which an outage of ten seconds begins, in which nothing answers
    outage_until = 0.0
    requests = failed = 0
    draw = random.Random(0)
    url = ""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        self.requests += 1
        if self.requests == self.outage_at:
            self.outage_until = time.monotonic() + 10
        drawn, is_out = self.draw.random(), time.monotonic() < self.outage_until
        self.failed += is_out or drawn < self.failing
        if is_out:
            raise ConnectionError  # the server closes the connection without an answer
        if drawn < self.failing / 2:
            start_response("500 Internal Server Error", [])
            return [b""]
        content = b"".join(self.moto(environ, start_response))
        return _cut(content) if drawn < self.failing else [content]


def _cut(content: bytes) -> Iterator[bytes]:
    yield content[: len(content) // 2]
    raise ConnectionError


@contextmanager
def s3_server() -> Iterator[Storage]:
    """Serve it on a free port of 127.0.0.1."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    quiet = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None})
    storage = Storage()
    server = make_server("127.0.0.1", 0, storage, threaded=True, request_handler=quiet)
    storage.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield storage
    server.shutdown()
