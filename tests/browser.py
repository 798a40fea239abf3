"""Chromium without a window, driven over a pipe by its DevTools protocol."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One tab."""

    def __init__(self, to: int, of: int) -> None:
        self.to, self.of, self.number, self.rest, self.session = to, of, 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> Any:
        """Send a command of the protocol, and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.of, 1 << 20)
            answer, _, self.rest = self.rest.partition(b"\0")
            if (found := json.loads(answer)).get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def js(self, code: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, code: str, seconds: float = 20) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.js(code)):
            assert time.monotonic() < end, f"{code}: {self.js('document.body?.innerText')}"
            time.sleep(0.02)
        return value

    def open(self, url: str, width: int = 1200, dark: bool = False) -> None:
        """Open a page, as wide as the window of a desktop or a phone."""
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **window)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def drop(self, *files: Path) -> None:
        """Drop files in the middle of the page, as from a file manager."""
        data = {"items": [], "files": [*map(str, files)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=150, y=150, data=data)


@contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A tab of a browser that keeps its files in a folder, and finds no other machine."""
    (theirs, to), (of, answers) = os.pipe(), os.pipe()
    words = [str(CHROMIUM), "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-gpu"]
    words += ["--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    words += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera that shows a test card
    words += ["--no-sandbox"] if os.geteuid() == 0 else []

    # The browser reads commands from 3 and writes answers to 4.
    line = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "bash", *words]
    process = subprocess.Popen(line, pass_fds=(theirs, answers), stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(answers)
    try:
        yield Tab(to, of)
    finally:
        process.terminate()
        process.wait()
        os.close(to)
        os.close(of)
