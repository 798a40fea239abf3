"""The commands: how each starts, and how it ends in one message when something is wrong.

Nothing here imports torch or lightning.
"""

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from lit_nn import distributed
from lit_nn.flags import UsageError, help_text, nearest, to_dotted

PICTURES = (".png", ".jpg", ".svg", ".pdf")  # endings of files that pictures are drawn into


class CommandParser(argparse.ArgumentParser):
    """A parser whose complaints are `UsageError`s, with the nearest of the allowed names.

    Args:
        script: Name of the command's file in scripts/, without ".py".
        what: What the command does, one sentence.
    """

    def __init__(self, script: str, what: str) -> None:
        super().__init__(f"python scripts/{script}.py", description=what, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as a `UsageError`."""
        hint = ""
        if unknown := re.search(r"unrecognized arguments: (--?\w+)", message):
            hint = nearest(unknown[1], self._option_string_actions)
        elif choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hint = nearest(choice[1], re.findall(r"[\w.]+", choice[2]))
        raise UsageError(f"{message}.{hint} All options: {self.prog} --help")


def check_picture(option: str, path: Path) -> None:
    """Refuse a file that no picture can be drawn into, before the work of which the picture is the end.

    Args:
        option: What the file was given with.
        path: The file.

    Raises:
        UsageError: If its name does not end like that of a picture.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{option} {path}: the file's name must end in {', '.join(PICTURES)}")


def brief(error: BaseException) -> str:
    """The first line of what an error says; its kind if it says nothing."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def run(command: Callable[[], None]) -> int:
    """Run a command; whatever a user can cause ends in one message instead of a traceback.

    Such errors are an OSError, or say themselves with which ``exit_status`` they end the command: 2 if what was typed
    cannot be done, 1 for anything else. Of several processes of one run, one prints the message and all end.

    Args:
        command: What to do.

    Returns:
        Exit status.
    """
    if os.environ.get("LIT_NN_DEBUG") == "1":
        command()
        return distributed.end(0)
    try:
        command()
    except BrokenPipeError:  # whoever read the output has seen enough: "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return distributed.end(1)
    except KeyboardInterrupt:
        return distributed.end(130, "Interrupted.")
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning has made an exit with status 1
            return distributed.end(130, "Interrupted.")
        raise
    except Exception as error:
        status = getattr(error, "exit_status", 1 if isinstance(error, OSError) else None)
        if status is None:
            return distributed.crash(error)
        return distributed.end(int(status), f"error: {error}" if status in (1, 2) else str(error))
    return distributed.end(0)


def command(main: Callable[[list[str]], None]) -> Callable[..., int]:
    """Make the ``main`` of a program out of a function that takes the words of a command line; a decorator.

    Args:
        main: What to do.

    Returns:
        A function that takes the words, or those of this process if it is given none, and returns the exit status; see
        `run`.
    """

    @functools.wraps(main)
    def program(argv: Sequence[str] | None = None) -> int:
        return run(lambda: main(sys.argv[1:] if argv is None else list(argv)))

    return program


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = (), title: str | None = None
) -> None:
    """Print a table, as wide as the terminal; 120 letters where there is none.

    Args:
        columns: What stands above each.
        rows: A text for each column.
        right: Columns with numbers, which stand at the right.
        title: What stands above all.
    """
    from rich.box import SIMPLE  # only here: it takes as long as all else that predict.py imports
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)


def _refuse_early(words: list[str]) -> None:
    """Refuse what can be seen to be mistyped without lightning; several processes connect first, to say it once."""
    if set(distributed.launched().values()) == {1}:
        to_dotted(words)


@command
def train(words: list[str]) -> None:
    """Train a classifier, then test its best checkpoint: ``python scripts/train.py``."""
    if words in (["--help"], ["-h"]):
        print(help_text("python scripts/train.py", "Train an image classifier, then test its best checkpoint."))
        return
    _refuse_early(words)
    from lit_nn.cli import TrainCLI  # only now: it imports lightning, which takes seconds

    TrainCLI(["fit", *words])


@command
def lightning_cli(words: list[str]) -> None:
    """Run the subcommand of the LightningCLI that the command line names: ``python -m lit_nn``, ``lit-nn``."""
    _refuse_early(words)
    from lit_nn.cli import LitCLI

    LitCLI(words)
