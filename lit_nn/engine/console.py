"""How a command starts and ends: its words, its exit status, one message for what a user can cause. No torch here."""

import argparse
import functools
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_nn.errors import UsageError, did_you_mean, place

SYNONYMS = {"learning_rate": "lr", "model": "net", "gpus": "devices"}  # what other programs call an option
FIGURES = (".png", ".jpg", ".svg", ".pdf")  # endings of files that figures are drawn into
ADVERTS = ("💡 Tip", "TPU available", "Restoring states", "Restored all states", "Loaded model", "`weights_only`")
HARMLESS = ("is smaller than the logging interval", "treespec, LeafSpec", "callbacks used to create the checkpoint")


class CommandParser(argparse.ArgumentParser):
    """The parser of scripts/SCRIPT.py, whose complaints are `UsageError`s with the nearest of the allowed names."""

    def __init__(self, script: str, what: str, **options: Any) -> None:
        super().__init__(f"python scripts/{script}.py", description=what, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        unknown = re.search(r"unrecognized arguments: --?([\w.]+)", message)
        names = [option.lstrip("-") for option in self._option_string_actions]
        raise UsageError(unknown_option(unknown[1], names) if unknown else f"{message}. All options: --help")


def unknown_option(name: str, allowed: Iterable[str]) -> str:
    """The message about an option that a command does not have."""
    hint = f" Did you mean {SYNONYMS[name]}?" if name in SYNONYMS else did_you_mean(name, allowed)
    return f"unknown option '{name}'.{hint} All options: --help"


def check_figure(option: str, path: Path) -> None:
    """Refuse a file that no figure can be drawn into, before the work of which the figure is the end."""
    if path.suffix.lower() not in FIGURES:
        raise UsageError(f"{option} {path}: the file's name must end in {', '.join(FIGURES)}")


def rank() -> int:
    """Number of this process among those that torchrun, SLURM or Lightning has started; 0 for a process alone."""
    return int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0))


def command(main: Callable[[list[str]], None]) -> Callable[..., int]:
    """Make a program of a function that takes the words of a command line; it gives the exit status. A decorator.

    An error with an ``exit_status`` ends in one message: 2 if what was typed cannot be done, 1 if something else went
    wrong, any other if nothing did. Others keep their traceback; of those of the operating system, file and line.
    """

    @functools.wraps(main)
    def program(argv: Sequence[str] | None = None) -> int:
        _print_any_name()
        try:
            main([_at_home(word) for word in (sys.argv[1:] if argv is None else argv)])
        except BrokenPipeError:  # whoever read the output has seen enough: "| head"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes an exit of Ctrl-C
            if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            return _end(130, "Interrupted.")
        except Exception as error:
            status = getattr(error, "exit_status", 1 if isinstance(error, OSError) else None)
            if os.environ.get("LIT_NN_DEBUG") == "1" or status is None:
                raise
            text = str(error) if hasattr(error, "exit_status") else f"{error} ({place(error)})"
            return _end(int(status), f"error: {text}" if status in (1, 2) else text)
        return 0

    return program


def _at_home(word: str) -> str:
    """A word in which ~ is the home folder, after = as well, where shells leave it as it is."""
    found = re.fullmatch(r"(--[\w.+]+=|)(~[^/\\]*[/\\].*)", word, re.DOTALL)
    return found[1] + os.path.expanduser(found[2]) if found else word  # noqa: PTH111 (Path's raises without a home)


def _end(status: int, text: str) -> int:
    """Say how a command has ended; of several processes the first one says what is wrong in all of them."""
    sys.stdout.flush()
    if rank() == 0 or status == 1:
        print(f"rank {rank()}: {text}" if rank() else text, file=sys.stderr)
    if status > 2 and int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
        if rank() > 0:
            return 0  # the first process passes it on
        time.sleep(3)  # a launcher that sees one end ends the others, which may not be through yet
    return status


def _print_any_name() -> None:
    """Let every file's name be printed, also where the output goes to a file or a pipe in an old encoding."""
    encoding = {} if "PYTHONIOENCODING" in os.environ else {"encoding": "utf-8"}
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not stream.isatty():
            stream.reconfigure(errors="backslashreplace", **encoding)


def quieten() -> None:
    """Keep adverts and warnings that say nothing about the run off the terminal."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(ADVERTS))
        if rank() > 0:
            logging.getLogger(name).setLevel(logging.WARNING)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a place in the code


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = (), title: str | None = None
) -> None:
    """Print a table of texts, as wide as the terminal (120 letters without one); columns ``right`` hold numbers."""
    from rich.box import SIMPLE  # only here: it takes as long as all else that predict.py imports
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)
