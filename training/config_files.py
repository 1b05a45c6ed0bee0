"""A configuration read from YAML and `key=value`, and written back.

Precedence, lowest first: the defaults in training/config.py, the file named as `base` in the YAML file, the YAML file,
the overrides on the command line. Unknown keys and wrong types are refused with the nearest valid name: no setting is
ignored silently.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, Namespace

from training.config import Config, ConfigError, nearest, plain

FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where PyYAML was built with libyaml


@functools.cache
def key_parser() -> ArgumentParser:
    """A parser that knows every key of Config and its type."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(Config)
    return parser


def key_help(kind: type = Config, prefix: str = "") -> str:
    """Every key with its type, default and meaning, as `--help` prints it."""
    meanings = {entry.arg_name: entry.description for entry in parse_from_object(kind).params}
    text = ""
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.default_factory):
            text += key_help(f.default_factory, f"{prefix}{f.name}.")
        else:
            default = repr(f.default) if f.default is not dataclasses.MISSING else f"{f.default_factory.__name__}()"
            meaning = textwrap.indent(textwrap.fill(" ".join(meanings[f.name].split()), 100), "    ")
            text += f"{prefix}{f.name}: {f.type} = {default}\n{meaning}\n"
    return text


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `key=value` overrides on top; raises ConfigError with one sentence."""
    return config_reader(path)(overrides)


def config_reader(path: str | Path | None = None) -> Callable[[Sequence[str]], Config]:
    """`load_config` of one file for any number of lists of overrides; the file is read and checked once."""
    parser = key_parser()
    values = _read_yaml(Path(path)) if path is not None else {}
    _check_keys(values, str(path))
    with _in_one_sentence():
        below = parser.parse_object(values, defaults=True) if values else parser.get_defaults()

    def read(overrides: Sequence[str]) -> Config:
        arguments = [_as_option(text) for text in overrides]
        for argument in arguments:
            _check_keys(_nest(argument[2:].split("=", 1)[0]), "the command line")
        with _in_one_sentence():
            return _instantiate(parser, parser.parse_args(arguments, namespace=below.clone()))

    return read


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    """Turn whatever a parser raises into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_one_sentence(error)) from error


def _instantiate(parser: ArgumentParser, namespace: Namespace) -> Config:
    values = parser.instantiate(namespace)
    return Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})


def to_yaml(config: Config) -> str:
    """The resolved configuration; `load_config` of it gives an equal Config."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a YAML file over those of the file it names as its `base`, which lies beside it."""
    if path in above:
        raise ConfigError(f"{above[-1]} names {path} as its base, which is built on {above[-1]} itself")
    values = read_mapping(path)
    base = values.pop("base", None)
    return values if base is None else _merge(_read_yaml(path.parent / str(base), (*above, path)), values)


class OnceLoader(FAST_LOADER):
    """Refuses a mapping that gives a key twice, of which PyYAML would keep the last without a word."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        given: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.value in given:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            given[key.value] = key, value
        super().flatten_mapping(node)  # puts what << names before the keys beside it
        node.value = list({key.value: (key, value) for key, value in node.value}.values())


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of one YAML file; raises ConfigError with one sentence."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
    except OSError as error:
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"cannot read {path}: {error.strerror}; YAML files in that folder: {known}") from error
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        # of its syntax, its encoding, its depth, or of values such as !!int '' and 2001-13-45
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, found {type(values).__name__}")
    return values


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merge(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return below | above | both


def _as_option(text: str) -> str:
    if "=" not in text or text.startswith("="):
        raise ConfigError(f"expected key=value on the command line, got {text!r}")
    return "--" + text.lstrip("-")


def _nest(dotted: str) -> dict[str, Any]:
    """The key as a section of sections, with ... for the value."""
    value: Any = ...
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _check_keys(values: dict[str, Any], where: str, kind: type = Config, prefix: str = "") -> None:
    """Refuse, at any depth, a key that no dataclass has, with the nearest valid one, and a value for a section."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown key {prefix}{key} in {where}{nearest(prefix + str(key), all_keys())}")
        if value is None and "None" not in fields[key].type:  # the parser would take it for "not given"
            raise ConfigError(f"{prefix}{key} in {where} must not be null; its type is {fields[key].type}")
        if dataclasses.is_dataclass(section := fields[key].default_factory):
            if not isinstance(value, dict):
                keys = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(section))
                raise ConfigError(f"{prefix}{key} in {where} is a section, not a value; its keys are {keys}")
            _check_keys(value, where, section, f"{prefix}{key}.")


def all_keys(kind: type = Config, prefix: str = "") -> list[str]:
    """Every key in dotted form, sections included."""
    keys = []
    for f in dataclasses.fields(kind):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.default_factory):
            keys += all_keys(f.default_factory, f"{prefix}{f.name}.")
    return keys


def _one_sentence(error: Exception) -> str:
    """A parser's message on one line, without the names of Python classes."""
    text = " ".join(str(error).split())
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.", "")
    union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*?\]?)\] Errors: .* Given value: (.*)"
    text = re.sub(union, r"Expected one of \1. Got value: \2", text)
    return re.sub(r'^Parser key "([^"]+)":', r"\1:", text)
