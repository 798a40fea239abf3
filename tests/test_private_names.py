"""Private names of Lightning and torch: only in lit_nn/engine, few, listed with a reason, missed with a sentence."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
from conftest import ROOT
from lightning.pytorch.callbacks import WeightAveraging
from test_imports import FILES

from lit_nn.engine import PRIVATE

THEIRS = ("lightning", "torch")
OF_OTHERS = {"_trial_id": "Optuna's"}
NAME = re.compile(r"_[a-zA-Z]\w*")
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def own_names() -> Iterator[str]:
    """Private names that this project itself defines."""
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


OWN = set(own_names())


def inherited(module: str, node: ast.ClassDef) -> str:
    """Source of the classes of Lightning and torch that one of the project's inherits from."""
    cls = getattr(importlib.import_module(module), node.name, object)  # object: a class inside of a function
    return "".join(inspect.getsource(base) for base in cls.__mro__ if base.__module__.partition(".")[0] in THEIRS)


def uses(module: str) -> Iterator[tuple[int, str]]:
    """Line and name of every private name of others in a file."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in THEIRS:
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if NAME.fullmatch(part))
        elif isinstance(node, ast.Attribute) and NAME.fullmatch(node.attr):
            if ast.unparse(node.value) not in ("self", "cls") and node.attr not in OWN:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Subscript | ast.Call):  # vars(x)["_name"], getattr(x, "_name")
            words = node.args if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr") else []
            for word in [node.slice] if isinstance(node, ast.Subscript) else words:
                if isinstance(word, ast.Constant) and NAME.fullmatch(str(word.value)) and word.value not in OWN:
                    yield node.lineno, str(word.value)
        elif isinstance(node, ast.ClassDef) and node.bases and not module.startswith("scripts"):
            theirs = inherited(module, node)
            for each in (each for each in ast.walk(node) if isinstance(each, ast.Attribute)):
                if NAME.fullmatch(each.attr) and re.search(rf"\b(self\.|def ){each.attr}\b", theirs):
                    yield each.lineno, each.attr


def test_they_are_used_in_the_engine_only_and_all_of_them_are_listed() -> None:
    found = {(name, line, used) for name in FILES for line, used in uses(name) if used not in OF_OTHERS}
    listed = {where.rpartition(".")[2] for where in PRIVATE}
    for module, line, used in sorted(found):
        place = Path(FILES[module]).relative_to(ROOT)
        assert module.startswith("lit_nn.engine."), f"{place}:{line} uses the private name {used}; only engine/ may"
        assert used in listed, f"{place}:{line} uses {used}, which lit_nn.engine.PRIVATE does not give a reason for"
    gone = listed - {used for *_, used in found}
    assert not gone, f"no longer used: {gone}; take them out of lit_nn.engine.PRIVATE"
    assert len(listed) <= 25
    assert all(PRIVATE.values())


@pytest.mark.parametrize("where", PRIVATE)
def test_this_lightning_has_it(where: str) -> None:
    trainer = L.Trainer(fast_dev_run=True, accelerator="cpu", logger=False, enable_model_summary=False)
    roots = SimpleNamespace(trainer=trainer, module=L.LightningModule(), averaging=WeightAveraging())
    path, _, name = where.rpartition(".")
    owner = importlib.import_module(path) if path.startswith("lightning.") else attrgetter(path)(roots)
    what = f"lightning {L.__version__} has no {where} any more, which lit_nn/engine needs: {PRIVATE[where]}"
    assert hasattr(owner, name), what
