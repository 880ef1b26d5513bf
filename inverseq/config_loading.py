"""From a recipe or YAML file and ``section.key=value`` overrides to a validated ``Config``, and back to YAML.

OmegaConf reads the YAML (duplicate keys are errors, 1e-6 is a number) and resolves ``${section.key}``; this module
checks keys and types against the dataclasses, so that every mistake is one ValueError naming key, value and what was
expected. Paths in a configuration are relative to the working directory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import Config, iter_options
from .config_hints import describe_unknown, did_you_mean

__all__ = ["config_differences", "load_config", "recipe_names", "recipe_path", "to_yaml"]

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe_or_file: str | Path) -> Path:
    """The YAML file of a recipe's name or of a path; ValueError with the nearest recipe when there is neither."""
    text, path = str(recipe_or_file), Path(recipe_or_file)
    if text in recipe_names():
        return RECIPES / f"{text}.yaml"
    if path.is_dir():
        raise ValueError(f"--config {text}: is a directory; expected a YAML file or a recipe")
    if path.exists():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in text:
        raise ValueError(f"--config {text}: no such file")
    hint = did_you_mean(text, recipe_names())
    raise ValueError(f"--config {text}: no such recipe or file{hint} (recipes: {', '.join(recipe_names())})")


def load_config(recipe_or_file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a recipe or file with ``section.key=value`` overrides on top.

    Raises ValueError for a file that is missing, not text, not YAML or not a mapping, for unknown keys (naming the
    nearest), values of the wrong type or out of range, and malformed or repeated overrides.
    """
    path = recipe_path(recipe_or_file)
    tree = read_yaml(path)
    for key, value in parse_overrides(overrides).items():
        *sections, leaf = key.split(".")
        target = tree
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return build(Config, resolve_interpolations(tree, str(recipe_or_file)))


def to_yaml(config: Config) -> str:
    """The configuration as YAML that ``load_config`` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(escape_interpolations(dataclasses.asdict(config))))


def config_differences(ours: Config, theirs: Config, ignore: Sequence[str] = ()) -> list[str]:
    """``key: our value here, their value there`` of every option not ignored in which two configurations differ."""
    flat_ours, flat_theirs = flatten(dataclasses.asdict(ours)), flatten(dataclasses.asdict(theirs))
    return [
        f"{key}: {value!r} here, {flat_theirs[key]!r} there"
        for key, value in flat_ours.items()
        if key not in ignore and value != flat_theirs[key]
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def option_types() -> dict[str, str]:
    """Dotted key to type annotation of every option."""
    return {key: annotation for key, annotation, _, _ in iter_options()}


def section_names() -> list[str]:
    """Dotted names of all sections, those inside another included."""
    keys = [key.split(".") for key in option_types()]
    return sorted({".".join(parts[:depth]) for parts in keys for depth in range(1, len(parts))})


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted key to value of ``key=value`` words; values are read by the option's type, text exactly as given."""
    types, values = option_types(), {}
    for word in overrides:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise ValueError(f"{word!r}: expected section.key=value, for example contrast.alpha=1.4")
        if key in section_names():
            example = next(name for name in types if name.startswith(f"{key}."))
            raise ValueError(f"{word!r}: {key} is a section; set one of its keys, for example {example}=…")
        if key not in types:
            raise ValueError(f"{word!r}: unknown key {key}{describe_unknown(key, [*types])}")
        if key in values:
            raise ValueError(f"{word!r}: {key} is given twice")
        values[key] = parse_value(text, types[key])
    return values


def parse_value(text: str, annotation: str) -> Any:
    """An override's value. Text keeps every character, unless it is quoted; null stands for none."""
    if annotation == "int":
        return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else text
    if annotation == "float":
        return text
    if annotation.startswith("str") and not re.fullmatch(r"""null|~|'.*'|".*\"""", text, flags=re.DOTALL):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path) -> dict[str, Any]:
    """The nested dictionary of a YAML file, keys checked."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise ValueError(f"{path}: holds no configuration")
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise ValueError(f"{path}: holds {kind}; expected a mapping of section.key: value")
        check_keys(root, path)
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{describe_yaml_error(error)}") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {describe_omegaconf_error(error)}") from None
    return fill_empty_sections(tree)


def fill_empty_sections(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree with an empty mapping for each section that was written without keys."""
    filled = {}
    for key, value in tree.items():
        if f"{prefix}{key}" in section_names():
            value = fill_empty_sections(value or {}, f"{prefix}{key}.")
        filled[key] = value
    return filled


def check_keys(node: yaml.MappingNode, path: Path, prefix: str = "") -> None:
    """Raise ValueError with file and line for an unknown key, or for a section that is no mapping."""
    known, sections = [*option_types()], section_names()
    for key_node, value_node in node.value:
        written, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        key = f"{prefix}{written}"
        if "." in written and key in (*known, *sections):
            section, _, leaf = key.rpartition(".")
            raise ValueError(f"{where}: write {key} as key {leaf} of section {section}")
        if key not in sections:
            if key not in known:
                names = known if prefix else [*sections, *known]
                raise ValueError(f"{where}: unknown key {key}{describe_unknown(key, names)}")
            continue
        if isinstance(value_node, yaml.ScalarNode) and value_node.value in ("", "null", "~"):
            continue
        if not isinstance(value_node, yaml.MappingNode):
            raise ValueError(f"{where}: {key} is a section; expected a mapping of its keys")
        check_keys(value_node, path, f"{key}.")


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """``:line: what is wrong`` on one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f":{mark.line + 1}" if mark is not None else ""
    return f"{line}: is not YAML: {problem or ' '.join(str(error).split())}"


def describe_omegaconf_error(error: OmegaConfBaseException) -> str:
    key = f"{error.full_key}: " if error.full_key else ""
    return key + str(error.msg or error).splitlines()[0]


def resolve_interpolations(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """Replace ``${section.key}`` and ``${oc.env:NAME}`` by what they stand for."""
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {describe_omegaconf_error(error)}") from None


def escape_interpolations(value: Any) -> Any:
    r"""The value with ``${`` in its texts written as ``\${`` and backslashes before it doubled."""
    if isinstance(value, Mapping):
        return {key: escape_interpolations(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return list(value) if isinstance(value, tuple) else value


def build(section: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of a configuration dataclass from checked values; absent keys take their defaults."""
    arguments = {}
    for item in dataclasses.fields(section):
        if item.name not in values:
            continue
        value, key = values[item.name], f"{prefix}{item.name}"
        if callable(item.default_factory):
            arguments[item.name] = build(item.default_factory, value, f"{key}.")
        else:
            arguments[item.name] = coerce(key, value, item.type)
    return section(**arguments)


def coerce(key: str, value: Any, annotation: str) -> Any:
    """The value as the option's type; ValueError naming key, value and type when it is not one."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation == "str | None" and value is None:
        return None
    if annotation == "str | int" and is_number:  # a choice of words of which YAML reads some as numbers
        value, annotation = str(value), "str"
    if annotation == "str | bool" and isinstance(value, bool):  # or as truth values
        value, annotation = str(value).lower(), "str"
    if annotation in ("str", "str | None", "str | int", "str | bool"):
        return expect(isinstance(value, str), key, value, "text (in quotes when it looks like a number)")
    if annotation == "bool":
        return expect(isinstance(value, bool), key, value, "true or false")
    if annotation == "int":
        return expect(is_number and isinstance(value, int), key, value, "an integer")
    if annotation == "float":
        if isinstance(value, str):  # nan and inf are text in YAML; their range is checked by the dataclass
            try:
                return float(value)
            except ValueError:
                pass
        return float(expect(is_number, key, value, "a number"))
    assert annotation == "tuple[float, float]", f"{key}: no rule for {annotation}"
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    expect(is_pair, key, value, "a list of two numbers, for example [0.9, 0.999]")
    return tuple(coerce(key, number, "float") for number in value)


def expect(condition: bool, key: str, value: Any, expectation: str) -> Any:
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {expectation}")
    return value
