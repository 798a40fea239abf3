"""The page in Chromium: real files are dropped, and the labels are those of predict, with a server and without one."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from browser import CHROMIUM, Tab, chromium
from conftest import ROOT, script
from test_evaluate import made_up
from test_serve import serve, write_clothes

from lit_nn.trained.predict import Prediction, open_model, predict
from lit_nn.trained.report import write_report

pytestmark = pytest.mark.posix
RUNTIME = Path(os.environ.get("NODE_PATH", ROOT / "tests" / "node" / "node_modules"), "onnxruntime-web", "dist")
ROWS = """[...document.querySelectorAll('article')].map(card =>
    [...card.querySelectorAll('li')].map(row => row.innerText.split('\\n')))"""
TITLES = "[...document.querySelectorAll('article h2')].map(title => title.textContent)"  # newest first


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@contextmanager
def files_served(folder: Path) -> Iterator[str]:
    """The address of a server of files."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def titles(tab: Tab, count: int) -> list[str]:
    """What the page says of the images, in the order in which they were dropped."""
    tab.wait(f"{TITLES}.length === {count} && !{TITLES}.includes('…')")
    return tab.js(TITLES)[::-1]


def check_rows(tab: Tab, expected: list[Prediction], tolerance: float) -> None:
    """Labels, and what the bars say in percent, of all images."""
    assert len({prediction.label for prediction in expected}) > 3
    for rows, (labels, shares, *_) in zip(tab.js(ROWS)[::-1], expected, strict=True):
        assert rows[0][0] == labels[0]
        found = {label: float(share.removesuffix(" %")) / 100 for label, share in rows}
        assert found == pytest.approx(dict(zip(labels, shares, strict=True)), abs=tolerance)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_dropped_files_get_the_labels_of_predict(width: int, dark: bool, tab: Tab, run: Path, tmp_path: Path) -> None:
    paths, model = write_clothes(tmp_path), run / "checkpoints" / "best.onnx"
    expected = predict(open_model(model), paths, 5)
    with serve(model) as served:
        tab.open(served.url, width, dark=dark)
        tab.drop(*paths)
        assert titles(tab, 20) == [prediction.label for prediction in expected]
        check_rows(tab, expected, 0.00051)
        tab.drop(ROOT / "README.md")
        assert titles(tab, 21)[-1].startswith("The file is not an image")
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
        loaded = tab.js("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(name.startswith((served.url, "blob:", "data:")) for name in loaded)
        tab.js("document.querySelector('#camera').click()")
        tab.wait("document.querySelector('video').videoWidth")
        tab.js("document.querySelector('#take').click()")
        assert titles(tab, 22)[-1] in {*open_model(model).class_names}
        tab.js("""fetch(document.querySelector('article:last-child img').src).then(r => r.blob()).then(blob => {
            const data = new DataTransfer();
            data.items.add(new File([blob], 'pasted.png', {type: blob.type}));
            document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));
        })""")
        assert titles(tab, 23)[-1] == expected[0].label
        chosen = tab.call("Runtime.evaluate", expression="document.querySelector('#files')")["result"]["objectId"]
        tab.call("DOM.setFileInputFiles", files=[str(paths[1])], objectId=chosen)
        assert titles(tab, 24)[-1] == expected[1].label
    with serve(model, "--threshold", 0.99) as served:
        tab.open(served.url, width, dark=dark)
        tab.drop(paths[0])
        assert titles(tab, 1) == ["Not sure"]


@pytest.mark.skipif(not RUNTIME.is_dir(), reason="onnxruntime-web is not installed: npm install --prefix tests/node")
def test_the_page_without_a_server_gives_the_labels_of_predict(tab: Tab, run: Path, tmp_path: Path) -> None:
    words = [str(run / "checkpoints" / "best.ckpt"), "--format", "web", "--output", str(tmp_path / "web")]
    assert script("export")([*words, "--onnxruntime_web", str(RUNTIME)]) == 0
    paths = write_clothes(tmp_path)
    expected = predict(open_model(tmp_path / "web" / "model.onnx"), paths, 5)
    with files_served(tmp_path / "web") as url:
        tab.open(url)
        tab.drop(*paths)
        assert titles(tab, 20) == [prediction.label for prediction in expected]
        check_rows(tab, expected, 0.01)


def test_the_page_says_why(tab: Tab, run: Path) -> None:
    with serve(run / "checkpoints" / "best.ckpt") as served:
        tab.open(served.url)
        tab.wait("document.querySelector('#where').textContent")
        tab.drop(ROOT / "docs" / "images" / "boot.png")
        tab.wait("!!document.querySelector('.why')")
        shown = "document.querySelector('article img').src.slice(0, 15)"
        for expected in ("data:image/webp", "blob:http://127"):
            tab.js("document.querySelector('.why').click()")
            tab.wait(f"{shown} === '{expected}'")


NAMES = ["<script>document.title = 'hacked'</script>", '$title & "quoted"', "a_very_long_name_" * 9, *"defghij"]
ROWS_OF = "[...document.querySelectorAll('#classes tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_report_is_one_file_that_sorts(width: int, dark: bool, tab: Tab, tmp_path: Path) -> None:
    answers = made_up(300, 10, 3)
    overlays = dict.fromkeys(answers.mistakes[:30].tolist(), np.zeros((20, 30, 3), np.uint8))
    files = [f"<b>/{'long' * 20}{row}.png" for row in range(300)]
    answers = answers._replace(class_names=NAMES, files=files, overlays=overlays, threshold=0.5)
    found = write_report(answers, "<b>title</b>", tmp_path)
    tab.open((tmp_path / "report.html").as_uri(), width, dark=dark)
    assert tab.js("document.title") == "<b>title</b>"
    assert tab.js("document.documentElement.scrollWidth <= innerWidth")
    assert tab.js("[...document.images].every(image => image.complete && image.naturalWidth)")
    loaded = tab.js("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in loaded)
    assert len(tab.js("[...document.querySelectorAll('figure')].map(figure => figure.innerText)")) == 60
    assert f"{found['accuracy']:.2%}" in tab.js("document.body.innerText")
    rows = tab.js(ROWS_OF)
    assert [row[0] for row in rows] == NAMES
    for place, key in enumerate(["name", "precision", "recall", "f1", "support"]):
        column = {name: {"name": name, **row}[key] for name, row in found["per_class"].items()}
        values = NAMES if key == "name" else sorted(column.values())
        for order, sign in (("ascending", 1), ("descending", -1)):
            tab.js(f"document.querySelectorAll('#classes button')[{place}].focus()")
            for kind in ("keyDown", "keyUp"):
                enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
                tab.call("Input.dispatchKeyEvent", type=kind, **enter)
            sorts = tab.js("[...document.querySelectorAll('#classes th')].map(header => header.ariaSort)")
            assert sorts == ["none"] * place + [order] + ["none"] * (4 - place)
            names = [row[0] for row in tab.js(ROWS_OF)]
            assert [column[name] for name in names] == values[::sign]
