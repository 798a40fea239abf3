"""Serve an exported model over HTTP, with a page to try it on; --help lists the options."""

import asyncio
import os
import socket
import sys
from dataclasses import fields
from pathlib import Path

from lit_nn.engine.console import CommandParser, command
from lit_nn.errors import UsageError
from lit_nn.trained.batcher import Limits

KEY = "LIT_NN_API_KEY"


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
    for one in fields(Limits):
        text = f"{one.metadata['help']} [{one.default:,}]"
        parser.add_argument(f"--{one.name}", type=type(one.default), default=one.default, metavar="N", help=text)
    options = parser.parse_args(words)
    limits = Limits(**{one.name: getattr(options, one.name) for one in fields(Limits)})
    if low := [f"--{name} {value}" for name, value in vars(limits).items() if value < (name != "batch_wait")]:
        raise UsageError(f"{low[0]}: it must be at least 1")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UsageError(f"--threshold is {options.threshold}; it is a probability, 0 to 1")
    if not (key := os.environ.get(KEY, "")).isascii():
        raise UsageError(f"{KEY} has letters that not all clients send alike; it must be ASCII")
    server = Server(options.model, limits, options.threshold, key)
    try:
        listener = socket.create_server((options.host, options.port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--host {options.host} --port {options.port}: {error}") from error
    address = f"http://{options.host}:{listener.getsockname()[1]}"
    said = f"{options.model} is served: {address} (a page), {address}/docs. Ctrl-C ends it."
    asyncio.run(server.run(listener, lambda: print(said, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
