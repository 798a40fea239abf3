"""Settings of a run: what is wrong with them, YAML files, and those in a checkpoint, which is data and never code."""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from data_modules import DATA_SETS, option_names
from data_modules.files import atomic_path
from lit_nn.engine.flags import FLAGS, unknown_option
from lit_nn.errors import UsageError, brief


def explain(error: argparse.ArgumentError, parser: ArgumentParser) -> str:
    """What the parser found wrong, in one line, with the names that are nearest to an unknown one."""
    text = " ".join(str(error).split())
    unknown = re.search(
        r"unrecognized arguments: --?([\w.]+)|does not accept option '([\w.]+)'|Option '(\w+)' is not", text
    )
    several = re.search(r'key "([\w.]+)": (?:Does not validate|Expected an?) ', text)
    in_data = re.search(r'given class_path .*? Parser key "(\w+)": (.*?)( - Expected a <class|$)', text)
    expected = r"Subtypes: \[(.*?)\] Errors|Expected an? (typing\.Literal\[.*?\]|<class '\w+'>)"
    found, types = in_data or several, re.search(expected, in_data[0] if in_data else text)
    if found and types and not unknown:
        option = f"data.{in_data[1]}" if in_data else found[1]
        allowed = re.sub(r"typing\.Literal|<class '(.*?)'>", r"\1", types[1] or types[2]).replace("NoneType", "null")
        value = re.sub(r"NestedArg\(key='\w+', val=(.*)\)", r"\1", text.rpartition(" value: ")[2]).strip("'")
        return f"--{option} is '{value}'; allowed: {allowed}"
    if not unknown:
        return text
    names = [flag.name for flag in FLAGS] + list(parser.get_defaults().keys(branches=True))
    names += sorted({f"data.{option}" for name in DATA_SETS for option in option_names(name)})
    given = unknown[1] or unknown[2] or f"data.{unknown[3]}"
    takers = [name for name in DATA_SETS if given.rpartition(".")[2] in option_names(name)]
    if given in names and takers:
        return f"--{given} is an option of {', '.join(takers)} only; choose it with --data, or leave the option out"
    return unknown_option(given, names)


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file holds."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no options; it should look like the config.yaml of a run folder")
    if content.get("ckpt_path") or "resume" in content:
        raise UsageError(f"{path} names a run to continue; type --resume with it instead")
    data = content.get("data")
    if (name := data.get("class_path") if isinstance(data, dict) else data) in DATA_SETS:
        raise UsageError(f"{path}: in a YAML file, '{name}' is written data: {{class_path: {DATA_SETS[name]}}}")
    if flat_names := [flag for flag in FLAGS if flag.name in content and flag.option not in (flag.name, "data")]:
        flag = flat_names[0]
        group, _, name = flag.option.partition(".")
        nested = f"{group}: {{init_args: {{{name}: ...}}}}" if group == "data" else f"{group}: {{{name}: ...}}"
        raise UsageError(
            f"{path}: in a YAML file, '{flag.name}' is written {nested if name else f'{flag.option}: ...'}"
        )
    return content


def write_yaml(options: dict[str, Any], path: Path) -> None:
    """Write options so that every reader finds the same values: text that could be taken for a number is quoted."""

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z_/. -]*", text) and text.lower() not in ("nan", "inf", "infinity")
        return dumper.represent_scalar(
            "tag:yaml.org,2002:str", text, None if plain else "'" if text.isprintable() else '"'
        )

    Dumper.add_representer(str, represent)
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.dump(options, Dumper=Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def known_options(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run without its folder, and without what only older versions knew."""
    options = {flag.option for flag in FLAGS} - {"config", "run_dir", "ckpt_path"}
    return {name: value for name, value in settings.items() if name in {"model", "trainer", *options}}


def plain_settings(checkpoint: dict[str, Any], path: Path, trusted: bool) -> dict[str, Any]:
    """The settings in a checkpoint, which is data: it may choose none of the classes that a YAML file may.

    Those options are left out if ``trusted``, because then they come from the file given to ``--config``.
    """
    settings = checkpoint.get("settings")
    groups = ("data", "model", "trainer")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(group), dict) for group in groups):
        raise UsageError(f"{path} holds no settings; it was not saved by a run of scripts/train.py or lit-nn")
    try:
        settings = yaml.safe_load(yaml.safe_dump(settings))  # plain values, and no longer the checkpoint's own
    except yaml.YAMLError as error:
        raise UsageError(f"the settings in {path} are not those of a run: {brief(error)}") from error
    settings = known_options(settings)
    for group, name, value in list(_classes(settings)):
        if not trusted:
            raise UsageError(
                f"{path} names {value} for {group}.{name}; a checkpoint chooses no classes. "
                "If you trust it, say so by --config RUN_DIR/config.yaml"
            )
        settings[group].pop(name)
    return settings


def _classes(settings: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Group, name and value of each option that the parser could take for a class, or for a file that names one."""
    data = settings["data"]
    module, _, name = str(data.get("class_path")).rpartition(".")
    if module.partition(".")[0] != "data_modules" or name not in DATA_SETS.values():
        yield "data", "class_path", data.get("class_path")
    for group, options in (
        ("data", {"init_args": data.get("init_args")}),
        *((g, settings[g]) for g in ("model", "trainer")),
    ):
        for name, value in options.items():
            only_classes = name in ("callbacks", "logger", "plugins") and not (value is None or isinstance(value, bool))
            no_word = name in ("accelerator", "strategy", "profiler", "net") and not re.fullmatch(
                r"[\w-]+(/[\w.-]+)?",
                str(value),  # torchvision/NAME
            )
            if only_classes or no_word or "class_path:" in yaml.safe_dump(value):
                yield group, name, value


def flat(options: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration by their dotted names."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value
