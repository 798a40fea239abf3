"""What a server costs: requests a second of scripts/serve.py, two other servers, and the work alone.

    python -m pip install fastapi uvicorn httptools uvloop python-multipart litserve    # the others
    python benchmarks/serve.py --seconds 60 --rounds 3    # needs wrk, a package of most systems

wrk is 50 clients on the same cores, each of which sends an image, waits for the answer and sends the next one. All
servers decode with the same function and run the same session; all get the same bytes, a form with one file. The limit
is that function and that session alone, with the best number of threads (cores, or one more) and the best batch.
"""

import argparse
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from data_modules.images.decode import FORMATS
from lit_nn.trained.predict import Model, open_model

CORES = os.cpu_count() or 1
SERVERS = ["limit", "this server", "fastapi", "litserve"]
KEYS = ("cpu", "p50", "p99", "memory", "middle", "end")
COLUMNS = ["requests/s", "ms of a core", "p50 ms", "p99 ms", "MB idle", "MB after 5 s", "MB at the end", "errors"]
MODELS = {"mobilenet": ("torchvision/mobilenet_v3_small", (3, 224, 224), 1000), "lenet": ("lenet", (1, 28, 28), 10)}


def write_model(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a network with random weights, and an image of its size: .jpg, or .png for a gray one."""
    from lit_nn.model import ImageClassifier
    from lit_nn.trained.export import write_onnx

    net, shape, classes = MODELS[name]
    names = [f"class {number}" for number in range(classes)]
    facts = {"class_names": names, "image_shape": shape, "data": {}}
    classifier = ImageClassifier(names, shape, [0.5] * shape[0], [0.25] * shape[0], net=net).eval()
    write_onnx(classifier, {key: json.dumps(fact) for key, fact in facts.items()}, folder / f"{name}.onnx")
    blocks = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    image = Image.fromarray(blocks).resize(shape[1:], Image.Resampling.BICUBIC)
    file = folder / f"{name}.{'png' if shape[0] == 1 else 'jpg'}"
    image.convert("L" if shape[0] == 1 else "RGB").save(file, quality=90)
    return folder / f"{name}.onnx", file


def one_thread(path: Path) -> Model:
    """A model of which the session takes one thread, as in lit_nn/trained/serve.py."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return open_model(path)._replace(run_batch=lambda x: session.run(["logits", "probabilities"], {"pixels": x}))


def pixels(model: Model, file: Any) -> np.ndarray:
    """What every server does with a file."""
    with Image.open(file, formats=FORMATS) as image:
        image.draft(None, (2 * model.image_shape[2], 2 * model.image_shape[1]))
        return model.pixels(image)


def answer(model: Model, probabilities: np.ndarray) -> dict[str, Any]:
    """The five most probable classes."""
    best = np.argsort(-probabilities, kind="stable")[:5]
    return {"predictions": [{"label": model.class_names[k], "probability": float(probabilities[k])} for k in best]}


# --- the servers: each is a process of this file, but for ours -------------------------------------------------------


def serve_fastapi(path: Path, port: int) -> None:
    """A plain endpoint, in FastAPI's threads."""
    import uvicorn
    from fastapi import FastAPI, UploadFile

    app, model = FastAPI(), one_thread(path)

    @app.post("/predict")
    def predict(request: UploadFile) -> dict[str, Any]:
        return answer(model, model.run(pixels(model, request.file)[None])[1][0])

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if sys.argv[1:2] == ["litserve"]:  # at the top level, because its workers are started anew and look for the class
    import litserve
    from fastapi import Request

    class Api(litserve.LitAPI):
        """LitServe's way to say what is done."""

        def setup(self, device: str) -> None:
            """Open the model, in each worker."""
            self.model = one_thread(Path(sys.argv[2]))

        def decode_request(self, request: Request) -> np.ndarray:
            """An image of a request."""
            return pixels(self.model, request["request"].file)  # type: ignore[index]

        def predict(self, images: list[np.ndarray]) -> np.ndarray:
            """Run the model on a batch."""
            return self.model.run(np.stack(images))[1]

        def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
            """Leave the images as they are."""
            return inputs

        def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
            """One row for each image."""
            return list(output)

        def encode_response(self, output: np.ndarray) -> dict[str, Any]:
            """What is sent."""
            return answer(self.model, output)


def serve_litserve(port: int) -> None:
    """LitServe with batches, and a worker on each core."""
    api = Api(max_batch_size=8, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=CORES)
    server.run(port=port, log_level="warning", generate_client_file=False)


# --- the load ---------------------------------------------------------------------------------------------------------


LOAD = """
wrk.method, wrk.body = "POST", io.open(os.getenv("FORM"), "rb"):read("*a")
wrk.headers["content-type"] = "multipart/form-data; boundary=b"
wrong, threads = 0, {}
function setup(thread) table.insert(threads, thread) end
function response(status, headers, body)
    if status ~= 200 or not body:find("probability", 1, true) then wrong = wrong + 1 end
end
function done(summary, latency)
    local errors, of = 0, summary.errors
    for _, thread in ipairs(threads) do errors = errors + thread:get("wrong") end
    io.stderr:write(string.format('{"rate": %f, "p50": %f, "p99": %f, "answers": %d, "errors": %d}',
        1e6 * summary.requests / summary.duration, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
        summary.requests, errors + of.connect + of.read + of.write + of.timeout))
end
"""  # what wrk does, in Lua


def load(file: Path, port: int, clients: int, seconds: float) -> dict[str, Any]:
    """What clients see that send the same image again and again, each once it has the answer to the one before."""
    form = b'--b\r\ncontent-disposition: form-data; name="request"; filename="%s"\r\n\r\n%s\r\n--b--\r\n'
    (script := file.with_suffix(".lua")).write_text(LOAD, encoding="utf-8")
    (body := file.with_suffix(".form")).write_bytes(form % (file.name.encode(), file.read_bytes()))
    words = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}", "-s", script, f"http://127.0.0.1:{port}/predict"]
    environment = {**os.environ, "FORM": str(body)}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stderr)


def limit(path: Path, file: Path, seconds: float) -> None:
    """Print images a second without a server, as JSON."""
    model, data = one_thread(path), file.read_bytes()

    def rate(threads: int, batch: int, seconds: float) -> float:
        done, end = [0] * threads, time.perf_counter() + seconds

        def work(number: int) -> None:
            while time.perf_counter() < end:
                found = model.run(np.stack([pixels(model, io.BytesIO(data)) for _ in range(batch)]))[1]
                done[number] += len([answer(model, row) for row in found])

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(done) / seconds

    rates = {way: rate(*way, 1) for way in itertools.product((CORES, CORES + 1), (1, 2, 4, 8, 16, 32))}
    best, before = max(rates, key=rates.__getitem__), time.process_time()
    found = rate(*best, seconds)
    print(json.dumps({"rate": found, "best": best, "cpu": 1000 * (time.process_time() - before) / (found * seconds)}))


def usage(session: int) -> tuple[float, float]:
    """MB, and seconds on a core so far, of all processes of a session."""
    pages = ticks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            facts = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(facts[3]) == session:
                pages, ticks = pages + int(facts[21]), ticks + int(facts[11]) + int(facts[12])
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, ticks / os.sysconf("SC_CLK_TCK")


def measure(server: str, model: Path, file: Path, port: int, clients: int, seconds: float) -> dict[str, Any]:
    """Start a server, load it, end it."""
    if server == "limit":
        words = [sys.executable, __file__, "limit", model, file, str(seconds)]
        return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    words = ["scripts/serve.py", model, "--port", port] if server == "this server" else [__file__, server, model, port]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        request = ["curl", "-sf", "-F", f"request=@{file}", "-o", os.devnull, f"http://127.0.0.1:{port}/predict"]
        while subprocess.run(request, check=False).returncode:
            if process.poll() is not None:
                raise SystemExit(f"{server} has ended")
            time.sleep(0.02)
        found = {"started": time.perf_counter() - began, "memory": usage(process.pid)[0]}
        load(file, port, clients, min(seconds, 5))  # warms up
        found["middle"], before = usage(process.pid)
        found |= load(file, port, clients, seconds)
        found["end"], after = usage(process.pid)
        return found | {"cpu": 1000 * (after - before) / found["answers"]}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def main() -> None:
    """Run what the first word says: the comparison, or one of its parts."""
    match sys.argv[1:]:
        case ["fastapi", path, port]:
            serve_fastapi(Path(path), int(port))
        case ["litserve", _, port]:
            serve_litserve(int(port))
        case ["limit", path, file, seconds]:
            limit(Path(path), Path(file), float(seconds))
        case _:
            compare()


def compare() -> None:
    """Print a table for each model."""
    from measure import machine, table  # only here: it imports torch, which no server needs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS])
    options = parser.parse_args()
    print(f"{options.clients} clients, {options.seconds:g} s, n = {options.rounds}, alternating; {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            files, found = write_model(name, Path(folder)), {server: list[dict[str, Any]]() for server in SERVERS}
            for number in range(options.rounds):
                for server in SERVERS[:: -1 if number % 2 else 1]:
                    found[server].append(measure(server, *files, 8200, options.clients, options.seconds))
                    print(f"<!-- {name}, {server}: {json.dumps(found[server][-1])} -->", flush=True)
            rows = []
            for server, results in found.items():
                rates = [result["rate"] for result in results]
                cells = [server, f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"]
                middle = [statistics.median(result.get(key, 0) for result in results) for key in KEYS]
                cells += [f"{middle[0]:.2f}", *(f"{value:.0f}" for value in middle[1:])]
                rows.append([*cells, sum(result.get("errors", 0) for result in results)])
            print(f"\n{table([name, *COLUMNS], rows)}")


if __name__ == "__main__":
    main()
