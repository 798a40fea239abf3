"""Runs the Python snippets of a page, compares what they print with what the page shows, and follows its links."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

SNIPPET = re.compile(r"^```python( slow)?\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")


class Snippet(NamedTuple):
    """One ```python block of a page, with the ```text block that follows it with nothing in between."""

    line: int  # of the page, on which the code begins
    code: str
    shown: str  # "" if the page shows no output
    slow: bool  # whether the block is ```python slow


def snippets(path: Path) -> list[Snippet]:
    """The snippets of a page, in their order."""
    page = path.read_text(encoding="utf-8")
    return [Snippet(page.count("\n", 0, m.start(2)) + 1, m[2], m[3] or "", bool(m[1])) for m in SNIPPET.finditer(page)]


def commands(path: Path) -> list[str]:
    """The lines of the ```bash blocks of a page, without their comments."""
    lines = "".join(COMMANDS.findall(path.read_text(encoding="utf-8"))).splitlines()
    return [line.partition(" #")[0].rstrip() for line in lines]


def run_snippets(path: Path, folder: Path, slow: bool = False) -> None:
    """Run the snippets of a page, the slow ones only if asked for, one after the other, as one program in a folder."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder), torch.random.fork_rng(devices=[]):
        for snippet in (snippet for snippet in snippets(path) if slow or not snippet.slow):
            # Empty lines before the code give tracebacks the line numbers of the page.
            code = compile("\n" * (snippet.line - 1) + snippet.code, str(path), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, namespace)
            shown, printed = (
                [line.rstrip() for line in text.rstrip().splitlines()] for text in (snippet.shown, output.getvalue())
            )
            assert shown == printed, (
                f"{path}:{snippet.line}: on the left what the page shows, on the right what it prints"
            )


def broken_links(path: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    broken = []
    for link in LINK.findall(_without_code(path)):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if ":" not in link and not (target.exists() and (not anchor or anchor in _anchors(target))):
            broken.append(link)
    return broken


def _anchors(path: Path) -> set[str]:
    """What links to the headings of a page end in, as git servers and Sphinx with MyST make it."""
    headings = re.findall(r"^#+ +(.*?) *$", _without_code(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-") for heading in headings}


def _without_code(path: Path) -> str:
    """A page without its blocks of code, which have neither links nor headings."""
    return BLOCK.sub("", path.read_text(encoding="utf-8"))
