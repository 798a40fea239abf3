"""The server as a process of its own: its answers are those of predict, and nothing that is sent to it ends it."""

import base64
import http.client
import io
import json
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, Patch, Refused, png_claiming, script
from PIL import Image
from test_export import save_checkpoint

from data_modules import FashionMNISTSample
from lit_nn.trained.predict import open_model, predict

pytest.importorskip("httptools")
FORM = {"content-type": "multipart/form-data; boundary=mark"}
BOOT = (ROOT / "docs" / "images" / "boot.png").read_bytes()


class Served(NamedTuple):
    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, path: str, body: bytes | None = None, method: str = "", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
        response = connection.getresponse()
        content = response.read().decode()
        connection.close()
        return response.status, json.loads(content) if "json" in response.headers["content-type"] else content

    def send(self, data: bytes, then: str = "") -> int:
        """The status of the answer to raw bytes, followed by the end of what is sent ("half"), or byte by byte."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            if then == "slow":
                for byte in data[:8]:
                    client.sendall(bytes([byte]))
                    time.sleep(0.01)
            else:
                client.sendall(data)
            if then == "half":
                client.shutdown(socket.SHUT_WR)
            if then == "gone":  # at once, and what was received is thrown away
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return 0
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        status, _, body = answer.partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 ")
        if (code := int(status.split()[1])) != 200:
            assert re.fullmatch(r'\{"error": ".+"\}', body.decode()), body
        return code

    def memory(self, name: str = "VmRSS") -> int:
        """MB of the process now, or "VmHWM", at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) // 1000  # type: ignore[index]


@contextmanager
def serve(model: Path, *words: object) -> Iterator[Served]:
    line = [sys.executable, ROOT / "scripts" / "serve.py", model, "--port", 0, *words]
    process = subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    found = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
    assert found, process.communicate()
    try:
        yield Served(process, int(found[1]))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "model.ckpt"
    assert script("export")([str(save_checkpoint(path))]) == 0
    return path.with_suffix(".onnx")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serve(model) as found:
        yield found


def form(*files: tuple[str, bytes]) -> bytes:
    head = '--mark\r\ncontent-disposition: form-data; name="file"; filename="{}"\r\n\r\n'
    return b"".join(head.format(name).encode() + content + b"\r\n" for name, content in files) + b"--mark--\r\n"


def write_clothes(folder: Path) -> list[Path]:
    """Twenty test images of odd sizes: gray, in colour, with transparency; PNG, and JPEG turned by their EXIF."""
    paths, exif = list[Path](), Image.Exif()
    for number, pixels in enumerate(FashionMNISTSample().split("test")[0][:20, 0].numpy()):
        image = Image.fromarray(pixels).resize((25 + 7 * number, 120 - 4 * number))
        image = image.convert(("L", "RGB", "RGBA", "RGB")[number % 4])
        if image.mode == "RGBA":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        exif[0x0112] = 1 + number % 8  # orientation
        paths.append(folder / f"{number}.{'jpg' if number % 4 == 3 else 'png'}")
        image.save(paths[-1], exif=exif if number % 4 == 3 else None)
    return paths


def test_answers_are_those_of_predict(served: Served, model: Path, tmp_path: Path) -> None:
    paths = write_clothes(tmp_path)
    expected = predict(open_model(model), paths, 3)
    for path, (labels, shares, _, unlike) in zip(paths, expected, strict=True):
        status, answer = served.ask("/predict?top_k=3", path.read_bytes())
        assert (status, answer["model"], len(answer["version"])) == (200, "model", 12)
        found = answer["results"][0]["predictions"]
        assert [each["label"] for each in found] == labels
        assert [each["probability"] for each in found] == pytest.approx(shares, abs=2e-6)
        assert answer["results"][0]["unlike"] == pytest.approx(unlike, abs=1e-4)
    files = form(*((path.name, path.read_bytes()) for path in paths))
    status, answer = served.ask("/predict?top_k=1&threshold=0.99", files, **FORM)
    assert status == 200
    assert [result["file"] for result in answer["results"]] == [path.name for path in paths]
    assert [result["predictions"][0]["label"] for result in answer["results"]] == [each.label for each in expected]
    assert not any(result["sure"] for result in answer["results"])
    assert served.ask("/predict?threshold=0", BOOT)[1]["results"][0]["sure"]


def test_a_checkpoint_is_served_and_says_why(served: Served, model: Path) -> None:
    assert served.ask("/ready")[1]["heat_maps"] is False
    assert served.ask("/predict?heat_map=yes", BOOT) == (422, {"error": "heat_map is 'yes'; give true or false."})
    status, answer = served.ask("/predict?heat_map=true", BOOT)
    assert status == 422
    assert "needs a checkpoint" in answer["error"]
    with serve(model.with_suffix(".ckpt")) as other:
        assert other.ask("/ready")[1]["heat_maps"] is True
        with ThreadPoolExecutor(8) as pool:
            paths = ["/predict?heat_map=true", "/predict"] * 15  # those that only ask must not be seen by the others
            answers = list(pool.map(lambda path: other.ask(path, BOOT), paths))
        assert all(answer == answers[number % 2] for number, answer in enumerate(answers))
        kind, _, content = answers[0][1]["results"][0]["heat_map"].partition(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == (28, 28)


def test_requests_at_once_share_batches(served: Served) -> None:
    numbers = lambda: [int(n) for n in re.findall(r"_(?:images|batches)_total (\d+)", served.ask("/metrics")[1])]  # noqa: E731
    images, batches = numbers()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: served.ask("/predict", BOOT), range(300)))
    assert all(answer == answers[0] and answer[0] == 200 for answer in answers)
    more_images, more_batches = numbers()
    assert more_images - images == 300 > more_batches - batches


def test_what_it_says_of_itself(served: Served) -> None:
    status, facts = served.ask("/openapi.json")
    assert status == 200
    for path in facts["paths"]:
        method = "POST" if path == "/predict" else "GET"
        assert served.ask(path, BOOT if path == "/predict" else None)[0] == 200
        assert served.ask(path, method="PUT") == (405, {"error": f"{path} takes {method}, not PUT."})
    assert served.ask("/docs") == served.ask("/")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_commands_of_the_page_get_answers(served: Served) -> None:
    lines = re.findall(r"^curl .*", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.replace(":8000", f":{served.port}"))
        done = subprocess.run([*words, "-sSf"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
        assert "Ankle boot" in done.stdout or "lit_nn_requests_total" in done.stdout


FORM_NAMES = [('filename="a b.png"', "a b.png"), ("filename=boot.png; filename*=utf-8''boot.png", "boot.png")]
FORM_NAMES += [('filename=""', ""), ("filename*=UTF-8''b%C3%A9.png", "bé.png")]


@pytest.mark.parametrize(("given", "name"), FORM_NAMES)
def test_names_of_files_in_forms(given: str, name: str, served: Served) -> None:
    body = form(("", BOOT)).replace(b'filename=""', given.encode())
    status, found = served.ask("/predict", body, content_type="multipart/form-data; boundary=mark")
    assert (status, found["results"][0]["file"]) == (200, name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.pth"], "an .onnx: python scripts/export.py CKPT"),
        (["model.onnx", "--port", "70000"], "--port 70000"),
        (["model.onnx", "--threshold", "7"], "a probability, 0 to 1"),
        (["model.onnx", "--batch_size", "0"], "--batch_size 0: it must be at least 1"),
    ],
)
def test_what_cannot_be_served(words: list[str], said: str, model: Path, refused: Refused) -> None:
    assert said in refused(script("serve"), [str(model.with_name(words[0])), *words[1:]], 1, 2)


def test_a_form_may_be_larger_than_the_queue(model: Path) -> None:
    with serve(model, "--max_queue", 1) as served:
        assert served.send(post(form(("a", BOOT), ("b", BOOT)), head=MULTI)) == 200


def test_a_key_is_asked_for(model: Path, monkeypatch: Patch, refused: Refused) -> None:
    monkeypatch.setenv("LIT_NN_API_KEY", "schl\u00fcssel")
    assert "it must be ASCII" in refused(script("serve"), [str(model)])
    monkeypatch.setenv("LIT_NN_API_KEY", "open sesame")
    with serve(model) as served:
        assert [served.ask(path)[0] for path in ("/", "/health", "/metrics")] == [200, 200, 401]
        assert served.ask("/predict", BOOT)[0] == 401
        assert served.ask("/predict", BOOT, authorization="Bearer open")[0] == 401
        assert served.ask("/predict", BOOT, authorization="bearer open sesame")[0] == 200
        assert served.ask("/predict", BOOT, authorization="Bearer open sesame")[0] == 200


@pytest.mark.posix
def test_sigterm_answers_what_has_come(model: Path) -> None:
    request = f"POST /predict HTTP/1.1\r\ncontent-length: {len(BOOT)}\r\n\r\n".encode() + BOOT
    with serve(model, "--batch_wait", 400) as served, ThreadPoolExecutor(9) as pool:
        idle = socket.create_connection(("127.0.0.1", served.port))
        answers = [pool.submit(served.send, request) for _ in range(8)]
        time.sleep(0.2)
        served.process.send_signal(signal.SIGTERM)
        assert [answer.result() for answer in answers] == [200] * 8
        assert served.process.wait(10) == 0
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""
        assert idle.recv(1) == b""


# --- hostile and odd requests -----------------------------------------------------------------------------------------

LIMITS = ["--max_bytes", 100_000, "--max_seconds", 1, "--max_queue", 40, "--max_files", 4, "--max_pixels", 100_000]


def post(body: bytes, path: str = "/predict", head: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nconnection: close\r\n{head}content-length: {size}\r\n\r\n".encode() + body


def chunked(body: bytes) -> bytes:
    return b"POST /predict HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n" + body


MULTI = "content-type: multipart/form-data; boundary=mark\r\n"
Maker = Callable[[random.Random], bytes]
HOSTILE: dict[str, tuple[Maker, tuple[int, ...], str]] = {  # what is sent, the statuses, what the client then does
    "a good one": (lambda r: post(BOOT), (200,), ""),
    "a good one, half closed": (lambda r: post(BOOT), (200,), "half"),
    "a good one in chunks": (lambda r: chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BOOT), BOOT)), (200,), ""),
    "bytes": (lambda r: r.randbytes(r.randrange(1, 3000)) + b"\r\n\r\n", (400, 431), "half"),
    "a broken head": (lambda r: post(BOOT)[: r.randrange(1, 60)], (400,), "half"),
    "a broken body": (lambda r: post(BOOT)[: -r.randrange(1, len(BOOT))], (400,), "half"),
    "a slow head": (lambda r: post(BOOT), (408,), "slow"),
    "a slow body": (lambda r: post(BOOT[: r.randrange(len(BOOT))], length=len(BOOT)), (408,), ""),
    "a client that goes": (lambda r: post(BOOT)[: r.randrange(1, 900)], (0,), "gone"),
    "a truncated image": (lambda r: post(BOOT[: r.randrange(60, len(BOOT) - 60)]), (415, 422), ""),
    "a changed image": (lambda r: post(BOOT[:30] + r.randbytes(50) + BOOT[80:]), (200, 413, 415, 422), ""),
    "a bomb": (lambda r: post(png_claiming(r.randrange(1000, 60000), r.randrange(1000, 60000))), (413,), ""),
    "PostScript": (lambda r: post(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), (415,), ""),
    "text": (lambda r: post(b'{"image": "a"}', head="content-type: application/json\r\n"), (415,), ""),
    "nothing": (lambda r: post(b""), (415,), ""),
    "too long": (lambda r: post(b"", length=r.randrange(100_001, 1 << 62)), (413,), ""),
    "too long in chunks": (lambda r: chunked((b"fff0\r\n" + bytes(0xFFF0) + b"\r\n") * 2), (413,), ""),
    "no number": (lambda r: post(BOOT).replace(b"content-length: ", b"content-length: -"), (400,), ""),
    "two lengths": (lambda r: post(BOOT, head="transfer-encoding: chunked\r\n"), (400,), ""),
    "bad chunks": (lambda r: chunked(b"zz\r\n" + r.randbytes(20)), (400,), ""),
    "endless headers behind": (lambda r: chunked(b"0\r\na: " + b"b" * r.randrange(40_000, 90_000)), (431,), ""),
    "a long number": (lambda r: post(BOOT, f"/predict?top_k={'0' * 5000}1"), (422,), ""),
    "long headers": (lambda r: post(BOOT, head=f"x: {'a' * r.randrange(20_000, 60_000)}\r\n"), (431,), ""),
    "a long address": (lambda r: post(BOOT, "/" + "a" * 20_000), (431,), ""),
    "no such address": (lambda r: post(BOOT, f"/{r.randrange(9)}/../etc/passwd"), (404,), ""),
    "another method": (lambda r: post(BOOT).replace(b"POST", r.choice([b"PUT", b"GET", b"DELETE"]), 1), (405,), ""),
    "a tunnel": (lambda r: b"CONNECT a:1 HTTP/1.1\r\n\r\n", (400, 404), "half"),
    "parameters": (lambda r: post(BOOT, f"/predict?{r.choice(['top_k=', 'topk=3', 'threshold=nan'])}"), (422,), ""),
    "a long length": (lambda r: post(BOOT).replace(b"length: ", b"length: " + b"0" * 5000, 1), (200,), ""),
    "a form without end": (lambda r: post(form(("a", BOOT))[:-20], head=MULTI), (422,), ""),
    "a form without mark": (lambda r: post(r.choice([b"", b"abc"]), head=MULTI.partition(";")[0] + "\r\n"), (422,), ""),
    "an empty form": (lambda r: post(b"--mark--\r\n", head=MULTI), (422,), ""),
    "many files": (lambda r: post(form(*[("a", b"")] * r.randrange(5, 99)), head=MULTI), (413,), ""),
    "millions of parts": (lambda r: post(b"\r\n--mark" * 10_000, head=MULTI), (413,), ""),
    "one bad of two": (lambda r: post(form(("a", BOOT), ("b", b"x")), head=MULTI), (415,), ""),
}


@pytest.mark.posix
@pytest.mark.parametrize("count", [len(HOSTILE), pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_hostile_requests_get_a_sentence_and_the_next_one_its_answer(count: int, model: Path) -> None:
    chance = random.Random(count)
    with serve(model, *LIMITS) as served:
        assert served.ask("/predict", BOOT)[0] == 200
        before = served.memory()
        for number in range(count):
            kind = [*HOSTILE][number % len(HOSTILE)]
            make, statuses, then = HOSTILE[kind]
            assert served.send(make(chance), then) in statuses, kind
            began = time.perf_counter()
            assert served.ask("/predict", BOOT)[0] == 200, kind
            assert time.perf_counter() - began < 2, kind
        with ThreadPoolExecutor(64) as pool:  # many at once, also more than may wait
            many = post(form(*[("a", BOOT)] * 4), head=MULTI)
            found = set(pool.map(lambda _: served.send(many), range(count)))
        assert found <= {200, 429, 503}
        assert served.ask("/predict", BOOT)[0] == 200
        assert served.memory() < before + 60
        served.process.terminate()
        assert served.process.wait(10) == 0
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""


@pytest.mark.posix
def test_big_images_in_one_request_take_turns(model: Path) -> None:
    content = io.BytesIO()
    Image.new("L", (3000, 3000), 255).save(content, "PNG")
    with serve(model) as served:
        (alone,) = served.ask("/predict", content.getvalue())[1]["results"]
        before = served.memory("VmHWM")
        results = served.ask("/predict", form(*[("a", content.getvalue())] * 16), **FORM)[1]["results"]
        assert [one["predictions"] for one in results] == [alone["predictions"]] * 16
        assert served.memory("VmHWM") < before + 60


@pytest.mark.posix
@pytest.mark.slow
def test_start_and_memory(model: Path) -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with serve(model) as served:
            assert served.ask("/ready")[0] == 200
            seconds.append(time.perf_counter() - began)
            assert served.memory() <= 150
    assert min(seconds) <= 1
