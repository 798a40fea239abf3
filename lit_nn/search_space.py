"""The search space of a hyper-parameter search: a YAML file that says what may be chosen for which options."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lit_nn.flags import UsageError, flags, to_dotted

Space = dict[str, BaseDistribution]  # options as typed, without the dashes, and what may be chosen for them

RANGE = ("low", "high", "log", "step")
OWN = {"run_dir", "ckpt_path", "tune", "trainer.fast_dev_run"}  # a trial is a run that can be continued
ONE_PROCESS = {"devices": 1, "num_nodes": 1, "strategy": "auto"}  # several would look for each other


def read_space(path: Path) -> Space:
    """Read a search space: a YAML file with a list of choices or a range for each option.

    Args:
        path: The file.

    Raises:
        UsageError: If it is none, naming the line that is wrong.
    """
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file. The search space comes first: python scripts/sweep.py SPACE.yaml --trials 12"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{path} holds no search space; a line of one is: lr: {{low: 1e-4, high: 1e-2, log: true}}")
    return {str(name): _distribution(f"{path}: {name}", spec) for name, spec in content.items()}


def _distribution(place: str, spec: Any) -> BaseDistribution:
    try:
        if isinstance(spec, list):
            scalar = str | int | float | None
            return CategoricalDistribution([c if isinstance(c, scalar) else json.dumps(c) for c in spec])
        if isinstance(spec, dict) and {"low", "high"} <= spec.keys():
            if unknown := spec.keys() - set(RANGE):
                raise UsageError(f"{place}: unknown {unknown.pop()!r}. Allowed in a range: {', '.join(RANGE)}")
            log, numbers = spec.get("log", False), {k: v for k, v in spec.items() if k != "log"}
            if all(type(value) is int for value in numbers.values()):
                return IntDistribution(**numbers, log=log)
            return FloatDistribution(**{k: float(v) for k, v in numbers.items()}, log=log)  # YAML takes 1e-4 for a word
    except (TypeError, ValueError) as error:
        raise UsageError(f"{place}: {error}") from error
    raise UsageError(
        f"{place} is {spec!r}; it should be a list of choices, [adamw, nesterov], or a range, {{low: 1e-4, high: 1e-2, "
        "log: true}. An option that stays the same is given on the command line"
    )


def command_line(fixed: Sequence[str], values: dict[str, Any]) -> list[str]:
    """The command line of a training.

    Args:
        fixed: The options that stay the same, as typed.
        values: What was chosen for the others.
    """
    chosen = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return ["fit", *fixed, *(f"--{name}={value}" for name, value in chosen.items())]


def build(words: Sequence[str]) -> dict[str, Any]:
    """Build everything that a command line asks for, but train nothing.

    Returns:
        All options, as they would stand in config.yaml.

    Raises:
        UsageError: If it cannot be built.
    """
    from lit_nn.cli import LitCLI  # only now: it imports lightning, which takes seconds

    class Builder(LitCLI):
        def before_instantiate_classes(self) -> None:
            self.options = self.plain_config()
            for name, value in ONE_PROCESS.items():
                self.settings.trainer[name] = value

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    return Builder(words).options


def check(space: Space, fixed: Sequence[str]) -> dict[str, Any]:
    """Try every value of a search space, with the first ones of the other options, before anything is trained.

    A value that cannot be built is only announced: it may go well with other values.

    Args:
        space: What is searched for.
        fixed: The options that stay the same, as typed.

    Returns:
        All options of the first training that can be built.

    Raises:
        UsageError: If an option is unknown or given twice, a value is none of its type, or nothing can be built.
    """
    dotted = {flag.name: flag.option for flag in flags()}
    searched = [dotted.get(name, name) for name in space]
    given = [word[2:].partition("=")[0] for word in to_dotted(fixed) if word.startswith("--")]
    for name, option in zip(space, searched, strict=True):
        if option in given:
            raise UsageError(
                f"--{name} is given, but the search is to choose it; leave it out in one of the two places"
            )
        if searched.count(option) > 1:
            raise UsageError(f"the search space has {option} twice")
    if refused := OWN & {*given, *searched} or {"config"} & {*searched}:
        raise UsageError(
            f"--{refused.pop()} is not for a search, which gives every trial a run folder of its own, in which it "
            "goes on after a kill; leave it out"
        )

    values: dict[str, list[Any]] = {
        name: list(d.choices) if isinstance(d, CategoricalDistribution) else [d.low, d.high]  # type: ignore[attr-defined]
        for name, d in space.items()
    }
    first = {name: choices[0] for name, choices in values.items()}
    others = [{**first, name: value} for name, choices in values.items() for value in choices[1:]]
    tried = [_try(command_line(fixed, point)) for point in (first, *others)]
    built = [options for options in tried if not isinstance(options, UsageError)]
    problems = [error for error in tried if isinstance(error, UsageError)]
    if not built:
        raise problems[0]
    for problem in problems:
        print(f"Some trials will fail: {problem}")
    return built[0]


def _try(words: Sequence[str]) -> dict[str, Any] | UsageError:
    """See `build`; an error that has to do with several options at once is returned, not raised."""
    try:
        return build(words)
    except UsageError as error:
        if isinstance(error.__cause__, argparse.ArgumentError):
            raise
        return error
