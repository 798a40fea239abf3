"""A trained model over HTTP, an export without torch: a page and an API, described in docs/serving.md.

The little of HTTP that it needs stands on asyncio's streams and httptools' parser. A web framework takes longer for a
small image than the network does, and uvicorn, which would run one, answers nobody who has closed half of a connection,
waits for ever for the end of a header, and keeps it at any length.
"""

import asyncio
import hashlib
import hmac
import json
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qsl, unquote_to_bytes

import httptools
import numpy as np

from lit_nn.errors import UsageError, did_you_mean
from lit_nn.trained.batcher import Batcher, Limits, Refusal
from lit_nn.trained.predict import open_model, open_onnx

GOODBYE = 2  # seconds in which a client may still read its last answer
HEAD = 1 << 14  # bytes of a request's first line and headers
HEADERS = {401: "www-authenticate: Bearer\r\n", 429: "retry-after: 1\r\n", 503: "retry-after: 1\r\n"}
HTML = "text/html; charset=utf-8\r\ncontent-security-policy: default-src 'self' 'unsafe-inline' blob: data:"
JSON = "application/json"
PARAMETERS = {  # of /predict: how they look, what is said of others
    "top_k": ("0{0,9}[1-9][0-9]{0,8}", "a whole number from 1"),
    "threshold": (r"0?\.[0-9]{1,20}|[01](\.0*)?", "a number from 0 to 1"),
    "heat_map": ("true|false", "true or false"),
}


class Request:
    """A request as far as it has come; httptools' parser calls the methods."""

    def __init__(self, server: "Server") -> None:
        self.server, self.url, self.headers, self.body = server, bytearray(), dict[str, str](), bytearray()
        self.method, self.path, self.query = "", "", ""
        self.size = self.fed = 0  # bytes of the body, and of all that has come
        self.complete = self.keep = False  # keep: another one may follow on the same connection
        self.on_url, self.on_body = self.url.extend, self.body.extend
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:  # noqa: D102
        if self.complete:
            raise ValueError("another one, before this one is answered")

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:  # noqa: D102
        self.method, address = self.parser.get_method().decode(), httptools.parse_url(bytes(self.url))
        self.path, self.query = ((part or b"").decode("latin-1") for part in (address.path, address.query))
        self.keep = self.parser.should_keep_alive() and self.parser.get_http_version() == "1.1"

    def on_message_complete(self) -> None:  # noqa: D102
        self.complete = True

    def feed(self, data: bytes) -> None:
        """Take what has come; raises `Refusal` if it is not HTTP, too much, or nothing although more has to come."""
        limits = self.server.limits
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                raise Refusal(400, "This is not HTTP/1.1 as it should be.") from error
            self.keep = False  # what follows is left out; clients send it again on another connection
        self.server.held += len(self.body) - self.size
        self.size, self.fed = len(self.body), self.fed + len(data)
        # Each byte of a body may come as a chunk of its own; what else there is are headers, before it or behind.
        if self.fed - self.size > 2 * HEAD + min(16 * self.size, limits.max_bytes):
            raise Refusal(431, f"The headers have more than {HEAD:,} bytes.")
        announced = int(self.headers.get("content-length", "").lstrip("0") or 0)  # int refuses thousands of zeros
        if max(self.size, announced) > limits.max_bytes:
            raise Refusal(413, f"The request is too large; at most {limits.max_bytes:,} bytes are taken.")
        if self.server.held > limits.max_memory:
            raise Refusal(503, "The server holds as many bytes as it may; try again in a second.")
        if not data:
            raise Refusal(400, "The request broke off before its end.")

    def files(self) -> list[tuple[str, bytes]]:
        """Names and contents of the files that came: those of a form, or else the body is one, without a name."""
        kind, most = self.headers.get("content-type", ""), self.server.limits.max_files
        body = bytes(self.body)
        self.body.clear()
        if not kind.lower().startswith("multipart/"):
            return [("", body)]
        boundary = re.search(r'boundary="?([^";,\s]{1,70})', kind, re.IGNORECASE)
        mark = b"\r\n--" + (boundary[1].encode("latin-1") if boundary else b"\0")
        parts = (b"\r\n" + body).split(mark, 2 * most + 2)  # a hostile form could have millions
        files = []
        for part in parts[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            if name := re.search(rb"""filename\*?=(?:"((?:\\.|[^"\\])*)"|([^\s;]+))""", head[:4096], re.IGNORECASE):
                text = name[1] if name[2] is None else unquote_to_bytes(name[2].rpartition(b"''")[2])
                files.append((text.decode(errors="replace"), content))
        if len(files) > most or len(parts) > 2 * most + 2:
            raise Refusal(413, f"There are too many files; at most {most} are taken at once.")
        if not parts[-1].startswith(b"--"):
            raise Refusal(422, "The form does not end as it should.")
        if not files:
            raise Refusal(422, "There is no file in the form; curl sends one with -F file=@boot.png")
        return files


class Server:
    """Serves an exported model, with a threshold of its own or another one, to all or to those who send the key.

    A checkpoint can also say why. Raises UsageError or ModelError if the file cannot be served.
    """

    batcher: Batcher

    def __init__(self, path: Path, limits: Limits, threshold: float | None = None, api_key: str = "") -> None:
        if path.suffix not in (".onnx", ".ckpt"):
            raise UsageError(f"{path} cannot be served, a .ckpt can, and an .onnx: python scripts/export.py CKPT")
        self.model, self.no_heat_map = open_model(path), ""
        if path.suffix == ".onnx":
            self.model = open_onnx(path, threads=1)  # the batches share the cores
        else:
            import torch

            torch.set_num_threads(1)
        try:
            self.model.overlay(np.zeros(self.model.image_shape, np.uint8))
        except UsageError as error:
            self.no_heat_map = f"This model has no heat maps: {error}."
        self.limits, self.api_key, self.name = limits, api_key, path.stem
        self.threshold = self.model.threshold if threshold is None else threshold
        self.version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        self.connections, self.idle = set[asyncio.StreamWriter](), set[asyncio.StreamWriter]()
        self.statuses, self.seconds, self.held, self.stopping = Counter[int](), 0.0, 0, False
        page, facts = (
            Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.html", "openapi.json")
        )
        self.pages: dict[str, tuple[str, Callable[[], str]]] = {
            "/": (HTML, lambda: page),
            "/docs": (HTML, lambda: page),
            "/openapi.json": (JSON, lambda: facts),
            "/health": (JSON, lambda: '{"status": "alive"}'),
            "/ready": (JSON, self.ready),
            "/metrics": ("text/plain; version=0.0.4", self.metrics),
        }

    async def run(self, listener: socket.socket, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT, then answer what has come; ``ready`` is called once connections are taken."""
        loop, stop, self.batcher = asyncio.get_running_loop(), asyncio.Event(), Batcher(self.model, self.limits)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
        server = await asyncio.start_server(self.converse, sock=listener, limit=HEAD, backlog=1024)
        ready()
        await stop.wait()
        await asyncio.sleep(0.1)  # for what the system has taken, but not yet handed over
        self.stopping = True
        server.close()
        for writer in self.idle:
            writer.close()
        while self.connections:  # each has its limits of time
            await asyncio.sleep(0.01)
        self.batcher.pool.shutdown()

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client's requests, one after the other."""
        self.connections.add(writer)
        keep = True
        try:
            while keep:
                request, status, kind, began = Request(self), 200, JSON, time.perf_counter()
                try:
                    began = await self.receive(request, reader, writer)
                    async with asyncio.timeout(self.limits.max_seconds):
                        kind, text = await self.answer(request)
                except EOFError:
                    break
                except (Refusal, TimeoutError) as error:
                    status = getattr(error, "status", 503)
                    text = json.dumps({"error": str(error) or "There was no time for this; try again in a second."})
                finally:
                    self.held -= request.size
                    del request.parser  # which holds the request, as the request holds it
                keep, body = request.complete and request.keep and not self.stopping, text.encode(errors="replace")
                head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"content-type: {kind}"]
                head += [f"content-length: {len(body)}", "x-content-type-options: nosniff"]
                head += [f"connection: {'keep-alive' if keep else 'close'}", HEADERS.get(status, ""), ""]
                writer.write("\r\n".join(head).encode() + (b"" if request.method == "HEAD" else body))
                self.statuses[status] += 1
                self.seconds += time.perf_counter() - began
                async with asyncio.timeout(self.limits.max_seconds):
                    await writer.drain()
            async with asyncio.timeout(GOODBYE):  # closed at once, with bytes unread, the answer would be lost
                writer.write_eof()
                while await reader.read(1 << 16):
                    pass
        except (OSError, RuntimeError):  # the client has gone, or reads and sends nothing
            pass
        finally:
            self.connections.discard(writer)
            writer.close()
            asyncio.get_running_loop().call_later(GOODBYE, writer.transport.abort)

    async def receive(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
        """Take a request as it comes, and return when it began; raises EOFError if none comes."""
        seconds, first = self.limits.max_seconds, b""
        if len(self.connections) > self.limits.max_connections:
            raise Refusal(503, "There are too many connections; try again in a second.")
        self.idle.add(writer)
        try:
            async with asyncio.timeout(seconds) as timer:
                first = await reader.readexactly(1)
                self.idle.discard(writer)
                began = time.perf_counter()
                timer.reschedule(asyncio.get_running_loop().time() + seconds)
                request.feed(first + await reader.readuntil(b"\r\n\r\n"))
                self.check(request)
                if request.headers.get("expect", "").lower() == "100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                while not request.complete:
                    request.feed(await reader.read(1 << 16))
                return began
        except asyncio.LimitOverrunError as error:
            raise Refusal(431, f"The headers have more than {HEAD:,} bytes.") from error
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            if not first:
                raise EOFError from error
            late = isinstance(error, TimeoutError)
            sentence = f"The request has not come within {seconds:g} s." if late else "The headers broke off."
            raise Refusal(408 if late else 400, sentence) from error
        finally:
            self.idle.discard(writer)

    def check(self, request: Request) -> None:
        """Refuse a request of which the headers have come, before its body is waited for."""
        path, method = request.path, "GET" if request.method == "HEAD" else request.method
        if path not in (*self.pages, "/predict"):
            raise Refusal(404, f"There is no {path}; there are /predict, {', '.join(self.pages)}.")
        if method != (allowed := "POST" if path == "/predict" else "GET"):
            raise Refusal(405, f"{path} takes {allowed}, not {request.method}.")
        sent = re.sub("^bearer ", "", request.headers.get("authorization", ""), flags=re.IGNORECASE).encode()
        if self.api_key and path in ("/predict", "/metrics") and not hmac.compare_digest(sent, self.api_key.encode()):
            raise Refusal(401, "The key is missing or wrong; send it in a header: Authorization: Bearer KEY")

    async def answer(self, request: Request) -> tuple[str, str]:
        """Kind and content of the answer to a request that has come; an image that cannot be read refuses all of it."""
        if request.path in self.pages:
            kind, content = self.pages[request.path]
            return kind, content()
        options = {"top_k": "5", "heat_map": "false"}
        for name, text in parse_qsl(request.query, keep_blank_values=True)[:9]:
            if name not in PARAMETERS:
                raise Refusal(422, f"There is no parameter '{name}'.{did_you_mean(name, PARAMETERS)}")
            pattern, allowed = PARAMETERS[name]
            if not re.fullmatch(pattern, text):
                raise Refusal(422, f"{name} is '{text}'; give {allowed}.")
            options[name] = text
        if (heat_map := options["heat_map"] == "true") and self.no_heat_map:
            raise Refusal(422, self.no_heat_map)
        threshold = float(options["threshold"]) if "threshold" in options else self.threshold
        names, files = zip(*request.files(), strict=True)
        results = []
        for name, judged in zip(names, await self.batcher.judge([*files], heat_map), strict=True):
            if isinstance(judged, Refusal):
                raise Refusal(judged.status, f"{name}: {judged}" if name else str(judged))
            shares, unlike, overlay = judged
            result = {"file": name, **self.model.read(shares, int(options["top_k"]), threshold, unlike).plain}
            results.append({**result, "heat_map": overlay} if heat_map else result)
        return JSON, json.dumps({"model": self.name, "version": self.version, "results": results}, ensure_ascii=False)

    def ready(self) -> str:
        """The answer of /ready, refused if images should be sent elsewhere now."""
        if self.stopping or len(self.batcher.waiting) >= self.limits.max_queue:
            raise Refusal(503, "The server is ending." if self.stopping else "The queue is full.")
        said = {"status": "ready", "model": self.name, "version": self.version, "heat_maps": not self.no_heat_map}
        return json.dumps(said)

    def metrics(self) -> str:
        """The answer of /metrics, in the text format of Prometheus."""
        lines = [f'requests_total{{status="{status}"}} {count}' for status, count in sorted(self.statuses.items())]
        lines += [f"request_seconds_sum {self.seconds:.6f}", f"request_seconds_count {self.statuses.total()}"]
        lines += [f"images_total {self.batcher.images}", f"batches_total {self.batcher.batches}"]
        lines += [f"waiting_images {len(self.batcher.waiting)}", f"held_bytes {self.held}"]
        return "".join(f"lit_nn_{line}\n" for line in [*lines, f"connections {len(self.connections)}"])
