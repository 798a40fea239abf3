"""Private names of Lightning and torch: only in lit_nn/engine, few, listed with a reason, missed with a sentence."""

import importlib
import inspect
import io
import re
import tokenize
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

# os, Optuna, argparse, ends of strategies, what any NamedTuple has
OF_OTHERS = {"_exit", "_trial_id", "_suggest", "_option_string_actions", "_spawn", "_forkserver", "_asdict", "_fields"}
NAME = r"_[a-zA-Z]\w*"
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
DEFINED = re.compile(rf"(?:\b(?:def|class) |(?:^|self\.)(?={NAME}[^=()\n]*(?: = |: )))({NAME})", re.MULTILINE)
OWN = {name for text in TEXTS.values() for name in DEFINED.findall(text)}


def inherited(module: str) -> set[str]:
    """Private names of Lightning's and torch's classes from which those of a file inherit."""
    classes = [cls for cls in vars(importlib.import_module(module)).values() if inspect.isclass(cls)]
    bases = {base for cls in classes if cls.__module__ == module for base in cls.__mro__}
    sources = [inspect.getsource(base) for base in bases if base.__module__.startswith(("lightning.", "torch."))]
    return set(re.findall(rf"(?:self\.|def )({NAME})", "".join(sources)))


def uses(module: str) -> Iterator[tuple[int, str]]:
    """Line and name of every private name of others in a file, those in strings included: getattr(x, "_name")."""
    theirs = set() if module.startswith("scripts") else inherited(module)
    for token in tokenize.generate_tokens(io.StringIO(TEXTS[module]).readline):
        name = token.string.strip("\"'")
        if token.type not in (tokenize.NAME, tokenize.STRING):
            continue  # parts of an f-string, which are tokens from Python 3.12 on
        if re.fullmatch(NAME, name) and (name not in OWN or name in theirs):
            yield token.start[0], name


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
