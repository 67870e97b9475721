"""From YAML groups and ``key=value`` overrides to checked settings, and back to YAML.

    settings = compose(["experiment=finetune_llava_7b", "parallel=tp2", "train.lr=1e-5"])

Hydra's compose API does the composing (groups, ``defaults`` lists, the override grammar) and nothing else: it never sees argv,
the working directory or the logs. Pydantic does the checking. Every problem that can be found is found at once and raised as one
`SettingsError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pydantic

from llava_mcore.settings.schema import Settings

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
ROOT_CONFIG = "config"
SECTIONS = tuple(field.name for field in dataclasses.fields(Settings))


class SettingsError(ValueError):
    """What is wrong with the settings, one line each: the dotted path, the value, the reason and, where known, the fix."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def compose(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> Settings:
    """Compose and check the settings of a run.

    Args:
        overrides: ``experiment=NAME``, ``group=OPTION`` and ``dotted.path=value``, in Hydra's override grammar. A later one wins
            over an earlier one, and all of them win over the experiment. Keys need no ``+``.
        config_dir: the user's own tree of groups. Its files win over the package's of the same name.

    Raises:
        SettingsError: naming every problem found.
    """
    config_dir = _checked_dir(config_dir)
    options = group_options(config_dir)
    return _validated(_composed(overrides, config_dir, options), options)


def compose_dict(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> dict[str, Any]:
    """The composed settings as plain dicts, lists and scalars, before any check of names and values."""
    config_dir = _checked_dir(config_dir)
    return _composed(overrides, config_dir, group_options(config_dir))


def from_dict(values: dict[str, Any]) -> Settings:
    """Check plain values (of `to_dict`, of a stored YAML file). Raises `SettingsError` with every problem found."""
    return _validated(values, {})


def from_stored(values: dict[str, Any], overrides: Sequence[str]) -> Settings:
    """Settings that were stored (a checkpoint's), with ``dotted.path=value`` overrides on top.

    Raises:
        SettingsError: naming every problem found.
    """
    from omegaconf import OmegaConf

    if bad := [text for text in overrides if "=" not in text]:
        raise SettingsError(f"{text!r} is not key=value" for text in bad)
    merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
    return from_dict(OmegaConf.to_container(merged))  # type: ignore[arg-type]


def to_dict(settings: Settings) -> dict[str, Any]:
    """Plain dicts, lists and scalars. ``from_dict`` of it gives equal settings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(settings))


def dump_yaml(settings: Settings) -> str:
    """YAML that PyYAML (YAML 1.1) and OmegaConf (YAML 1.2 floats) both read back to equal settings."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes a string such as ``1e5``, which OmegaConf would read as a number."""

    Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)?$"), list("-+.0123456789")
    )
    return yaml.dump(to_dict(settings), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def group_options(config_dir: Path | str | None = None) -> dict[str, list[str]]:
    """The groups and their options: folders and the YAML files in them, the user's tree included."""
    options: dict[str, set[str]] = {}
    for root in [CONFIG_DIR] + ([Path(config_dir)] if config_dir else []):
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != ".":
                options.setdefault(group, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(options.items())}


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type of the schema in words a user reads: ``int > 0``, ``pad | square``, ``list of str``, ``int > 0 or null``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe(arguments[0], _constraints(arguments[1:]) + list(metadata))
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument, metadata) for argument in arguments)
    if annotation is type(None):
        return "null"
    if origin is list:
        return f"list of {describe(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} x {describe(arguments[0])}"
    if origin is dict:
        return f"{{{describe(arguments[0])}: {describe(arguments[1])}}}"
    bounds = [f"{sign} {getattr(item, name):g}" for item in metadata for name, sign in _BOUNDS if hasattr(item, name)]
    return " ".join([annotation.__name__, ", ".join(bounds)]).strip()


_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def _constraints(metadata: Iterable[Any]) -> list[Any]:
    """The bounds in an ``Annotated``: pydantic keeps those of ``Field(gt=0)`` one level down."""
    return [inner for item in metadata for inner in (getattr(item, "metadata", None) or [item])]


# ----------------------------------------------------------------------------------------------------------------- composing


def _checked_dir(config_dir: Path | str | None) -> Path | None:
    if config_dir is None:
        return None
    config_dir = Path(config_dir).expanduser().resolve()
    if not config_dir.is_dir():
        raise SettingsError(
            [f"--config-dir {config_dir}: no such folder; name one that holds model/, data/, ... with YAML files"]
        )
    return config_dir


def _composed(overrides: Sequence[str], config_dir: Path | None, options: dict[str, list[str]]) -> dict[str, Any]:
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    opened = _opened(overrides, options)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_callers_hydra_aside())
            stack.enter_context(_searched_first(config_dir))
            stack.enter_context(initialize_config_dir(str(CONFIG_DIR), job_name="llava_mcore", version_base="1.3"))
            composed = hydra_compose(ROOT_CONFIG, overrides=opened)
        return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if not error.options:
            raise SettingsError([_one_line(error)]) from error
        where = str(error).partition(":")[0]
        raise SettingsError([f"{where}: " + _unknown_option(group, option, error.options)]) from error
    except yaml.YAMLError as error:
        raise SettingsError([f"not valid YAML: {_one_line(error)}"]) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise SettingsError([_one_line(error)]) from error


@contextlib.contextmanager
def _callers_hydra_aside() -> Iterator[None]:
    """Hydra allows one initialisation a process; a caller (a notebook, a Hydra application) may hold it and gets it back."""
    from hydra.core.global_hydra import GlobalHydra

    held = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = held


@contextlib.contextmanager
def _searched_first(config_dir: Path | None) -> Iterator[None]:
    """Let Hydra look into the user's tree before the package's, so that a file of the same name wins.

    ``hydra.searchpath`` can only append, where the package's own file would win; a search-path plugin is Hydra's way to prepend.
    """
    if config_dir is None:
        yield
        return
    from hydra.core.plugins import Plugins

    plugin = _search_path_plugin()
    Plugins.instance().register(plugin)
    plugin.folder = config_dir
    try:
        yield
    finally:
        plugin.folder = None


_plugin: Any = None


def _search_path_plugin() -> Any:
    global _plugin
    if _plugin is None:
        from hydra.core.config_search_path import ConfigSearchPath
        from hydra.plugins.search_path_plugin import SearchPathPlugin

        class UserTree(SearchPathPlugin):
            """Prepends the folder of the composition under way, if it has one."""

            folder: Path | None = None

            def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
                if self.folder is not None:
                    search_path.prepend(provider="--config-dir", path=f"file://{self.folder}")

        _plugin = UserTree
    return _plugin


def _opened(overrides: Sequence[str], options: dict[str, list[str]]) -> list[str]:
    """Check the overrides' form and group choices, and open the struct: a ``key=value`` may set a key no YAML file wrote.

    Unknown keys are then found by the schema, which can say what was meant; Hydra could only say that ``+`` would let them pass.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    opened: list[str] = []
    problems: list[str] = []
    keys: list[str] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = "write key=value" if "=" not in text else _one_line(error).split(" See https")[0]
            problems.append(f"{text}: not an override; {reason}")
            continue
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] == "hydra":
            problems.append(f"{text}: Hydra only composes here, its settings have no effect; use --config-dir for another tree")
        elif override.is_sweep_override():
            problems.append(f"{text}: one run takes one value; write [a,b] for a list, or quote a text with commas")
        elif key in options and not override.is_delete():
            _choose_group(text, override, options, opened, problems)
        elif override.is_delete() or override.is_add() or override.is_force_add() or override.package is not None:
            opened.append(text)
        else:
            keys.append(key)
            opened.append("++" + text)
    if problems:  # nothing can be composed, but misspelt keys can be named too
        unknown = [key.split(".") for key in keys if not _is_known(key.split("."))]
        raise SettingsError(problems + [f"{'.'.join(path)}: unknown setting{_did_you_mean_path(path)}" for path in unknown])
    return opened


def _choose_group(text: str, override: Any, options: dict[str, list[str]], opened: list[str], problems: list[str]) -> None:
    key, value = override.key_or_group, override.value()
    if value is None:
        opened[:] = [earlier for earlier in opened if not earlier.startswith(f"{key}=")] + [f"~{key}"]
        return
    chosen = [name for name in (value if isinstance(value, list) else [value]) if name is not None]
    if any(isinstance(name, dict) for name in chosen):
        problems.append(f"{text}: {key} is a group; choose {key}=OPTION or set single values, {key}.NAME=VALUE")
        return
    unknown = [str(name) for name in chosen if str(name) not in options[key]]
    problems.extend(_unknown_option(key, name, options[key]) for name in unknown)
    if not unknown:
        # Every group here stands in the root's defaults list, so Hydra's `+experiment=x` habit means the same choice.
        opened.append(text.lstrip("+"))


def _unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    return f"{group}={option}: no such option{_did_you_mean(option, options)}; options of {group}: {', '.join(options)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ----------------------------------------------------------------------------------------------------------------- checking


def _validated(values: dict[str, Any], options: dict[str, list[str]]) -> Settings:
    if not isinstance(values, dict):
        raise SettingsError([f"settings must be a mapping with {', '.join(SECTIONS)}, not {type(values).__name__}"])
    problems = [f"{path}={value}: should be a finite number" for path, value in _leaves(values) if _not_finite(value)]
    stray = [(path, value) for path, value in _leaves(values) if _is_stray_boolean(path, value)]
    problems += [f"{path}={value}: should be {_BOOLEAN_FREE[path]}" for path, value in stray]
    missing = [path for path, value in _leaves(values) if value == "???"]
    try:
        settings = pydantic.TypeAdapter(Settings).validate_python(values)
    except pydantic.ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] in _MISSING and not isinstance(item["loc"][-1], int):
                missing.append(_dotted(item["loc"]))
            elif _dotted(item["loc"]) not in missing:
                problems.extend(_explained(dict(item)))
    problems += _missing_lines(missing, options)
    if problems:
        raise SettingsError(dict.fromkeys(problems))
    return settings


_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


def _missing_lines(missing: Sequence[str], options: dict[str, list[str]]) -> list[str]:
    """What is not set, a line each, and one line a group that says how to set it all at once."""
    lines = [f"{path}: required, not set" for path in dict.fromkeys(missing)]
    for group in dict.fromkeys(path.partition(".")[0] for path in missing):
        if options.get(group):
            lines.append(f"{group}: choose experiment=NAME, or {group}= one of {', '.join(options[group])}, or set each value")
    return lines


def _is_stray_boolean(path: str, value: Any) -> bool:
    """Whether ``true`` stands where a number belongs: pydantic would read it as 1."""
    if not _BOOLEAN_FREE:
        for keys in setting_paths():
            field = setting_field(keys)
            words = describe(field.annotation, field.metadata)
            if words.startswith(("int", "float")):
                _BOOLEAN_FREE[".".join(keys)] = words
    return isinstance(value, bool) and path in _BOOLEAN_FREE


_BOOLEAN_FREE: dict[str, str] = {}


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, item in values.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(values, (list, tuple)):
        for index, item in enumerate(values):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, values


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _dotted(location: Sequence[Any]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":
            path += f".{part}" if path else str(part)
    return path


def _explained(item: dict[str, Any]) -> list[str]:
    """One pydantic error as lines for a user. A cross-check may report several problems, one a line."""
    location, kind, value = item["loc"], item["type"], item["input"]
    path = _dotted(location)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return [f"{path}: unknown setting{_did_you_mean_path(location)}"]
    if location and location[-1] == "[key]":
        known = re.findall(r"'([^']+)'", item["msg"])
        return [f"{path}: unknown name{_did_you_mean(str(value), known)}; one of {', '.join(known)}"]
    if kind == "value_error":
        prefix = f"{path}: " if path else ""
        return [prefix + line for line in str(item["ctx"]["error"]).splitlines()]
    reason = re.sub(r"^Input ", "", item["msg"])
    if kind == "literal_error":
        reason += _did_you_mean(str(value), re.findall(r"'([^']+)'", item["msg"]))
    if kind in _MISSING:  # an element of a fixed-length list
        return [f"{_dotted(location[:-1])}={list(value)}: needs more values, {location[-1]} are not enough"]
    if kind == "list_type" and isinstance(value, str):
        reason += f"; write {path}=[{value}]"
    if kind == "string_type" and isinstance(value, (int, float)):
        reason += f"""; quote it: {path}='"{value}"'"""
    return [f"{path}={'null' if value is None else value}: {reason}"]


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _did_you_mean_path(location: Sequence[Any]) -> str:
    """The nearest name in the same section, else a setting of that name in another section."""
    parent, name = [str(part) for part in location[:-1]], str(location[-1])
    siblings = [path[len(parent)] for path in setting_paths() if list(path[: len(parent)]) == parent and len(path) > len(parent)]
    ends = {path[-1]: ".".join(path) for path in setting_paths()}
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near and name not in ends:
        return f" (did you mean {'.'.join([*parent, near[0]])}?)"
    near = difflib.get_close_matches(name, ends, n=1, cutoff=0.75)
    return f" (did you mean {ends[near[0]]}?)" if near else ""


def _is_known(path: Sequence[str]) -> bool:
    """Whether a path is a setting, a section that holds some, or a place inside a setting that is a mapping."""
    return any(tuple(path) == known[: len(path)] or tuple(path[: len(known)]) == known for known in setting_paths())


def setting_paths(cls: type = Settings, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every setting as a path, ``("train", "lr")``; of a section that may be null the section before what it holds."""
    paths: list[tuple[str, ...]] = []
    for name, field in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        section = _section(field.annotation)
        if section is not field.annotation:
            paths.append((*prefix, name))
        if section is not None:
            paths += setting_paths(section, (*prefix, name))
    return paths


def _section(annotation: Any) -> Any:
    """The section of settings that a type is, or is where it is not null; None for a plain value or a list."""
    either = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    types_in = [part for part in (annotation, *either) if isinstance(part, type)]
    return next((part for part in types_in if dataclasses.is_dataclass(part)), None)


def setting_field(path: Sequence[str]) -> Any:
    """Pydantic's field (type, default, description) at a path of the schema."""
    cls: Any = Settings
    for name in path[:-1]:
        cls = _section(cls.__pydantic_fields__[name].annotation)
    return cls.__pydantic_fields__[path[-1]]
