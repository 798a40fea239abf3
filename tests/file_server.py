"""A web server on this machine for the tests of downloads, which can break off."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class FileServer:
    """What is served, and how."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # by path, "/a.gz"
        self.breaks_after: int | None = None  # bytes of each answer after which the connection is closed
        self.url = ""  # ends in "/"


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Serve files on a free port of 127.0.0.1."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = state.files.get(self.path, b"")
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: state.breaks_after])

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/"
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
