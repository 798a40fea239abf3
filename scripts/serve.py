"""Serve an exported model over HTTP, with a page to try it on; --help lists the options."""

import asyncio
import os
import socket
import sys
from pathlib import Path

from lit_nn.engine.console import CommandParser, command
from lit_nn.errors import UsageError
from lit_nn.trained.batcher import Limits

KEY = "LIT_NN_API_KEY"
HELP = {
    "max_bytes": "largest request in bytes",
    "max_pixels": "largest image in pixels",
    "max_files": "most images in a request",
    "max_seconds": "time for a request to come, and again to be answered",
    "max_queue": "images that may wait",
    "max_memory": "bytes of all requests together",
    "max_connections": "clients at once",
    "batch_size": "most images that go through the model at once",
    "batch_wait": "milliseconds that a batch waits for further images",
    "threads": "threads that decode and run the model",
}


@command
def main(words: list[str]) -> None:
    try:
        from lit_nn.trained.serve import Server
    except ModuleNotFoundError as error:
        raise UsageError(f'{error.name} is not installed: python -m pip install --editable ".[serve]"') from error
    parser = CommandParser("serve", f"Serve a model over HTTP, with a page; ${KEY} is the key that clients need.")
    what = "an .onnx of scripts/export.py; or a .ckpt, which is slower, but can say why"
    parser.add_argument("model", type=Path, metavar="MODEL", help=what)
    parser.add_argument("--host", default="127.0.0.1", help="[127.0.0.1]; 0.0.0.0 lets other machines ask too")
    parser.add_argument("--port", type=int, default=8000, help="[8000]; 0 takes a free one")
    parser.add_argument("--threshold", type=float, metavar="P", help='"not sure" below this probability [the model\'s]')
    for name, default in Limits()._asdict().items():
        kind, letter = (float, "X") if isinstance(default, float) else (int, "N")
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=letter, help=f"{HELP[name]} [{default:,}]")
    options = parser.parse_args(words)
    limits = Limits(*(getattr(options, name) for name in Limits._fields))
    if low := [f"--{name} {value}" for name, value in limits._asdict().items() if value < (name != "batch_wait")]:
        raise UsageError(f"{low[0]}: it must be at least 1")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UsageError(f"--threshold is {options.threshold}; it is a probability, 0 to 1")
    server = Server(options.model, limits, options.threshold, os.environ.get(KEY, ""))
    try:
        listener = socket.create_server((options.host, options.port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--host {options.host} --port {options.port}: {error}") from error
    address = f"http://{options.host}:{listener.getsockname()[1]}"
    said = f"{options.model} is served: {address} (a page), {address}/docs. Ctrl-C ends it."
    asyncio.run(server.run(listener, lambda: print(said, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
