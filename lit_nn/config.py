"""Options as they come in: what a YAML file may hold, and what is wrong with a command line, in one message.

Nothing here imports torch or lightning.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_nn.flags import UsageError, nearest, unknown_option

TRUSTED = ("lightning", "torch", "torchmetrics", "lit_nn", "data_modules")  # packages that a YAML file may name

UNKNOWN = re.compile(
    r"unrecognized arguments: --?(?P<option>[^\s=]+)"
    r"|does not accept option '(?P<nested>[\w.]+)'"
    r"|Option '(?P<data>[\w.]+)' is not accepted"
)
GROUP = re.compile(r'^Parser key "(\w+)": Unable to load config \'(.*?)\'')  # of options
END = r"(.*?)(?= - |$)"  # of a value, after which other types may be tried
CHOICE = re.compile(r'key "([\w.]+)": Expected a typing.Literal\[(.*?)\]\. Got value: ' + END)
UNION = re.compile(
    r'key "([\w.]+)": Does not validate against any of the Union subtypes Subtypes: \[([^]]*)\] '
    r"Errors: (?:- Expected an? <class \S+ )+Given value type: \S+ \S+ Given value: " + END
)
BUILT = re.compile(r"^Does not validate .*? Errors: - (.*?) - Expected ")  # a class that refuses its arguments
TYPE = re.compile(r'key "([\w.]+)": Expected (?:a|an) (.*?)\. Got value: ' + END)


def values_of(option: str, words: Sequence[str]) -> list[str]:
    """Every value that a command line gives to an option."""
    values = [words[position + 1] for position, word in enumerate(words[:-1]) if word == option]
    return values + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of options, unless it would import code from outside the packages this project is made of.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UsageError: If it is none, or names such code.
    """
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no options; it should look like the config.yaml of a run folder")
    for place, value in class_names(content, path.parent):
        if _is_file(value, path.parent):
            raise UsageError(f"{path}: {place} names the file {value}; write here what stands in it")
        if "/" in value or ("." in value and value.partition(".")[0] not in TRUSTED):
            raise UsageError(f"{path}: {place} names {value}; a file may name classes of {', '.join(TRUSTED)} only")
    return content


def class_names(value: Any, folder: Path = Path(), place: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a configuration that the parser could take for a class to import, or for a file that names some.

    Args:
        value: The configuration, or a part of it.
        folder: Where the parser looks for files, besides the working directory.
        place: Of the part, dotted.

    Yields:
        The place of each such string, and the string.
    """
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        here = f"{place}.{key}".lstrip(".")
        if isinstance(item, dict | list):
            yield from class_names(item, folder, here)
        elif isinstance(item, str):
            dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", item)
            in_trainer = here.startswith("trainer.") and (dotted or _is_file(item, folder))
            if key == "class_path" or here in ("data", "model", "trainer") or in_trainer:
                yield here, item


def _is_file(name: str, folder: Path) -> bool:
    """Whether it is the name of a file in the working directory or the folder."""
    try:
        return Path(name).is_file() or (folder / name).is_file()
    except (OSError, ValueError):  # no file can have such a name
        return False


def explain(error: Exception, options: Sequence[str], script: str = "train") -> str:
    """What the parser found wrong, in one line, with the names that are nearest to an unknown one.

    Args:
        error: Of the parser.
        options: All options there are, without dashes.
        script: The command's file in scripts/, without ".py".
    """
    text = " ".join(str(error).split())
    if unknown := UNKNOWN.search(text):
        name = f"data.{unknown['data']}" if unknown["data"] else unknown["option"] or unknown["nested"]
        return unknown_option(name, nearest(name, options), script)
    if group := GROUP.search(text):
        return f"--{group[1]} takes a YAML file, which '{group[2]}' is not.{nearest(group[1], options)}"
    if built := BUILT.search(text):
        return built[1]
    if choice := CHOICE.search(text):
        option, allowed, given = choice.groups()
        names = re.findall(r"'([^']*)'", allowed)
        return f"--{_in_full(option, options)} is '{given}'.{nearest(given, names)} Allowed: {', '.join(names)}"
    if wrong := TYPE.findall(text) or UNION.findall(text):
        option, expected, given = wrong[-1]
        return f"--{_in_full(option, options)} is '{given}', expected " + re.sub(r"<class '(.*?)'>", r"\1", expected)
    return text


def _in_full(option: str, options: Sequence[str]) -> str:
    """An option as it is typed; the parser names those of the data set without their group."""
    return option if option in options else next((name for name in options if name.endswith(f".{option}")), option)
