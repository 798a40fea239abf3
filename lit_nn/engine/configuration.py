"""Settings of a run: what is wrong with them, YAML files, and those in a checkpoint, which is data and never code."""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from data_modules import DATA_SETS, option_names
from data_modules.files import atomic_path
from lit_nn.engine.console import unknown_option
from lit_nn.engine.flags import FLAGS
from lit_nn.errors import UsageError, brief


def explain(error: argparse.ArgumentError, parser: ArgumentParser) -> str:
    """What the parser found wrong, in one line, with the names that are nearest to an unknown one."""
    text = " ".join(str(error).split())
    patterns = r"unrecognized arguments: --?([\w.]+)", r"does not accept option '([\w.]+)'", r"Option '(\w+)' is not"
    unknown = next((found[1] for pattern in patterns if (found := re.search(pattern, text))), "")
    if not unknown:
        *keys, what = re.split(r'Parser key "([\w.]+)": ', text)
        types = re.search(r"Subtypes: \[(.*?)\] Errors|Expected an? (.*?)\. Got", what)
        value = re.search(r"(?:Given|Got) value: (.*?)(?= - Expected|$)", what)
        if problem := re.search(r"Problem with given class_path ('.*?': .*?) - ", what):
            return f"--{'.'.join(keys[1::2])}: {problem[1]}"
        if not types or not value:
            return text
        allowed = re.sub(r"typing\.Literal|<class '(.*?)'>", r"\1", types[1] or types[2]).replace("NoneType", "null")
        return f"--{'.'.join(keys[1::2])} is '{value[1]}'; allowed: {allowed}"
    options = {name: {f"data.{option}" for option in option_names(name)} for name in DATA_SETS}
    if "Option '" in text and 'key "data"' in text:
        unknown = f"data.{unknown}"
    if takers := [name for name in DATA_SETS if unknown in options[name]]:
        return f"--{unknown} is an option of {', '.join(takers)} only; choose it with --data, or leave the option out"
    names = [*(flag.name for flag in FLAGS), *parser.get_defaults().keys(branches=True)]
    return unknown_option(unknown, names + sorted(set().union(*options.values())))


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
    for flag in FLAGS:
        if flag.name in content and flag.option not in (flag.name, "data"):
            dotted = flag.option.replace("data.", "data.init_args.")
            raise UsageError(f"{path}: in a YAML file, '{flag.name}' is written {dotted}: ...")
    return content


def write_yaml(options: dict[str, Any], path: Path) -> None:
    """Write options so that every reader finds the same values: text that could be taken for a number is quoted."""

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z_/. -]*", text) and text.lower() not in ("nan", "inf", "infinity")
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')

    Dumper.add_representer(str, represent)
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.dump(options, Dumper=Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def plain_options(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """All options of a run as plain values, without its folder and the checkpoint it started from."""
    plain = known_options(json.loads(parser.dump(config, format="json", skip_unset=False)))
    texts = {name: text for name, text in vars(config.data.init_args).items() if isinstance(text, str)}
    plain["data"]["init_args"] |= texts  # the dump takes a folder 1e3 for a number
    return plain


def known_options(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run without its folder, and without what only older versions knew."""
    options = {"model", "trainer", *(flag.option for flag in FLAGS)} - {"config", "run_dir", "ckpt_path"}
    return {name: value for name, value in settings.items() if name in options}


def plain_settings(checkpoint: dict[str, Any], path: Path, trusted: bool) -> dict[str, Any]:
    """The settings in a checkpoint, which may choose no classes; if ``trusted``, those of ``--config`` replace them."""
    given = checkpoint.get("settings")
    settings = given if isinstance(given, dict) else {}
    if not all(isinstance(settings.get(group), dict) for group in ("data", "model", "trainer")):
        raise UsageError(f"{path} holds no settings to go on with; --weights {path} starts a new run from its weights")
    try:
        settings = yaml.safe_load(yaml.safe_dump(settings))  # plain values, and no longer the checkpoint's own
    except yaml.YAMLError as error:
        raise UsageError(f"the settings in {path} are not those of a run: {brief(error)}") from error
    settings = known_options(settings)
    # What the run began with is not asked for again: the checkpoint has the weights, and what belongs to them.
    its = checkpoint["hyper_parameters"]
    own = {"weights": "none", **{name: its[name] for name in ("net_args", "backbone_lr") if name in its}}
    for group, name, value in [*_classes(settings), *_classes({"data": {}, "model": own, "trainer": {}})]:
        if not trusted:
            text = "a checkpoint chooses no classes. If you trust it, say so by --config RUN_DIR/config.yaml"
            raise UsageError(f"{path} names {value} for {group}.{name}; {text}")
        for place in (settings[group], own):
            place.pop(name, None)
    settings["model"] |= own
    return settings


def settings_of_data(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The data set that a checkpoint was trained on, in its split and at its size; {} if it does not say."""
    settings = plain_settings(checkpoint, path, trusted=True) if checkpoint.get("settings") else {"data": {}}
    return {n: settings[n] for n in ("data", "seed_everything")} if "class_path" in settings["data"] else {}


def _classes(settings: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Group, name and value of each option that the parser could take for a class, or for a file that names one."""
    word = r"[\w-]+(/[\w.-]+)?"  # torchvision/NAME
    for group in ("data", "model", "trainer"):
        for name, value in settings[group].items():
            if name == "class_path":
                module, _, kind = str(value).rpartition(".")
                chosen = module.partition(".")[0] != "data_modules" or kind not in DATA_SETS.values()
            elif name in ("callbacks", "logger", "plugins"):
                chosen = value is not None and not isinstance(value, bool)
            else:
                is_word = name not in ("accelerator", "strategy", "profiler", "net") or re.fullmatch(word, str(value))
                chosen = not is_word or _names_class(value)
            if chosen:
                yield group, name, value


def _names_class(value: Any) -> bool:
    """Whether the parser would find a class in a value; it reads text as YAML, too."""
    if isinstance(value, dict):
        return "class_path" in value or any(map(_names_class, value.values()))
    if isinstance(value, str):
        try:
            content = yaml.safe_load(value)
        except yaml.YAMLError:
            return False
        return content != value and _names_class(content)
    return isinstance(value, list) and any(map(_names_class, value))


def flat(options: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration by their dotted names."""
    for name, value in options.items():
        yield from flat(value, f"{place}{name}.") if isinstance(value, dict) else [(f"{place}{name}", value)]
