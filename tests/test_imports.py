"""Who may import whom, how far it is from the shell to the loss, and how much there is to read on the way."""

import ast
import graphlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from conftest import ROOT, Patch, script

PATHS = [path for folder in ("lit_nn", "data_modules", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}

TORCH = "torch torchmetrics torchvision timm lit_nn.errors"
# What each room may import besides Python's own library; a room is named by the longest name that fits. "*" is every
# package of others; "-" takes away.
ROOMS = {
    "data_modules": "* data_modules",
    "lit_nn": "* lit_nn data_modules -lit_nn.engine",
    "lit_nn.errors": "",
    "lit_nn.nets": f"{TORCH} lit_nn.nets",
    "lit_nn.losses": TORCH,
    "lit_nn.metrics": TORCH,
    "lit_nn.multi_label": f"{TORCH} lit_nn.metrics",
    "lit_nn.optim": TORCH,
    "lit_nn.initialise": TORCH,
    "lit_nn.model": "torch lit_nn.errors lit_nn.nets data_modules.images.fit",
    "lit_nn.finetune": "lightning torch lit_nn.errors lit_nn.nets lit_nn.model",
    "lit_nn.progress": "lightning lit_nn.errors",
    "lit_nn.checkpoint": "* -lightning lit_nn.__version__ lit_nn.errors lit_nn.model data_modules.files",
    "lit_nn.classifier": f"lightning {TORCH} lit_nn.nets lit_nn.losses lit_nn.metrics lit_nn.optim lit_nn.initialise "
    "lit_nn.multi_label lit_nn.model lit_nn.checkpoint lit_nn.finetune lit_nn.progress data_modules",
    "lit_nn.trained": "* -lightning lit_nn.__version__ lit_nn.errors lit_nn.model lit_nn.checkpoint lit_nn.trained "
    "lit_nn.multi_label data_modules",
    "lit_nn.engine": "* lit_nn data_modules",
    "lit_nn.__main__": "lit_nn",
    "scripts": "* lit_nn data_modules",
}
CORE = [
    *("scripts/train.py", "lit_nn/engine/cli.py", "lit_nn/engine/flags.py", "lit_nn/model.py", "lit_nn/classifier.py"),
    *("data_modules/base.py", "data_modules/batches.py", "data_modules/fashion_mnist_sample.py"),
    *("lit_nn/nets/__init__.py", "lit_nn/nets/lenet.py", "lit_nn/losses.py", "lit_nn/metrics.py"),
]


def imports(node: ast.AST, at_start: bool = True) -> Iterator[tuple[int, str, bool]]:
    """All imports below a node: the line, the name in full, and whether it is imported when the file itself is."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, at_start) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"line {child.lineno}: a relative import; write it in full"
            yield from ((child.lineno, f"{child.module}.{alias.name}", at_start) for alias in child.names)
        else:
            for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from imports(child, at_start and not for_types and not isinstance(child, ast.FunctionDef))


IMPORTS = {name: list(imports(ast.parse(path.read_text(encoding="utf-8")))) for name, path in FILES.items()}


def longest(name: str, among: Any) -> str:
    """The longest of some names that a dotted name begins with; "" if there is none."""
    return max((other for other in among if f"{name}.".startswith(f"{other}.")), key=len, default="")


@pytest.mark.parametrize("name", FILES)
def test_every_file_imports_only_what_its_room_may(name: str) -> None:
    room = longest(name, ROOMS)
    allowed = ROOMS[room].split()
    for line, imported, _ in IMPORTS[name]:
        top = imported.partition(".")[0]
        others = top not in ("lit_nn", "data_modules", "scripts", "tests")
        rule = longest(imported, [word.removeprefix("-") for word in allowed])
        fine = top in sys.stdlib_module_names or (rule in allowed if rule else others and "*" in allowed)
        place = FILES[name].relative_to(ROOT)
        assert fine, f"{place}:{line} imports {imported}; {room} may import: {ROOMS[room] or 'nothing'}"


def test_no_imports_run_in_a_circle() -> None:
    graph = {name: {longest(used, FILES) for _, used, now in found if now} for name, found in IMPORTS.items()}
    try:
        graphlib.TopologicalSorter({name: needed - {"", name} for name, needed in graph.items()}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these files import one another in a circle: {' <- '.join(error.args[1])}")


def test_six_frames_lead_from_the_shell_to_the_loss(monkeypatch: Patch) -> None:
    stack: list[traceback.FrameSummary] = []
    cross_entropy = F.cross_entropy

    def watched(*args: Any, **kwargs: Any) -> Any:
        stack[:] = stack or traceback.extract_stack()
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", watched)
    assert script("train")(["--fast_dev_run", "--accelerator", "cpu"]) == 0
    own = [frame for frame in stack if Path(frame.filename) in FILES.values()]
    # In a shell, the module of scripts/train.py calls main(), as the line above does here.
    way = ["scripts/train.py <module>", *(f"{Path(frame.filename).relative_to(ROOT)} {frame.name}" for frame in own)]
    assert way[1] == "lit_nn/engine/console.py program"  # the decorated main
    assert way[-1] == "lit_nn/losses.py cross_entropy"
    assert len(way) <= 6, way


def test_the_core_path_is_short() -> None:
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in CORE}
    print("\n".join(f"{count:5} {name}" for name, count in lines.items()))
    assert sum(lines.values()) <= 1600
