"""Options as a user gives them: a file, overrides over it, checked as one tree; and the resolved tree written back.

The written tree begins with a line that holds its hash, compared on reading: a run must not continue under options that a
damaged disk changed.
"""

from __future__ import annotations

import difflib
import hashlib
import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from causalrm_ray.config.base import Choice, RunFolder, Section
from causalrm_ray.config.train import Config, ModelConfig
from causalrm_ray.errors import ConfigError
from causalrm_ray.files import write_whole

Tree = TypeVar("Tree", bound=Section)
HASH_LINE = "# sha256 of the lines below: "


class Option(NamedTuple):
    """One option: its dotted key, the type and the default as a user writes them, and its meaning."""

    key: str
    kind: str
    default: str
    meaning: str


def options(section: type[Section] = Config, prefix: str = "", values: Section | None = None) -> Iterator[Option]:
    """Every option below `section`, those of nested sections too, whether or not they are set by default.

    `values` holds the defaults, if they are not those of the class.
    """
    for name, info in section.model_fields.items():
        key, nested = f"{prefix}{name}", section_in(info.annotation)
        default = getattr(values, name) if values else info.get_default(call_default_factory=True)
        if nested is not None:
            yield from options(nested, f"{key}.", default if isinstance(default, Section) else None)
        else:
            shown = "must be given" if info.is_required() else _as_yaml(default)
            yield Option(key, _kind(info.annotation, info.metadata), shown, info.description or "")


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, if it holds one or may hold one."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as values of it are written in YAML; a choice by its names."""
    choice = next((item for item in metadata if isinstance(item, Choice)), None)
    if choice is not None:
        return " | ".join((*choice.names(), "package.module:object"))
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0], parts[1:])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(_kind, parts))
    if origin is tuple:
        return f"[{', '.join('...' if part is ... else _kind(part) for part in parts)}]"
    if origin is dict:
        return f"{{{_kind(parts[0])}: {_kind(parts[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"{{{', '.join(f'{name}: {_kind(info.annotation)}' for name, info in annotation.model_fields.items())}}}"
    return "null" if annotation is NoneType else annotation.__name__.lower()


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def load_tree(kind: type[Tree], file: str | Path | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()) -> Tree:
    """Merge `key=value` defaults, a YAML file and overrides, later ones winning, and validate the result as a `kind`.

    A key may leave out its section where only one option has the name: `resume=true` is `run.resume=true`. `model=PATH` is both
    models.
    Raises ConfigError that names the key (and the nearest right one), the rule and the value.
    """
    return validate_tree(kind, _merge(kind, file, overrides, defaults))


def find_run(
    kind: type[Section], file: str | Path | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()
) -> RunFolder:
    """The folder of a run, from the same sources; the other options are not checked. Raises ConfigError."""
    run = _merge(kind, file, overrides, defaults).get("run", {})
    given = {name: run[name] for name in RunFolder.model_fields if name in run} if isinstance(run, dict) else run
    return validate_tree(_Where, {"run": given}).run


class _Where(Section):
    run: RunFolder = RunFolder()


def _merge(kind: type[Section], file: str | Path | None, overrides: Sequence[str], defaults: Sequence[str]) -> dict[Any, Any]:
    dotlist = [item for override in overrides for item in _expand(override, kind)]
    try:
        base = OmegaConf.load(io.StringIO(_read(Path(file)))) if file else OmegaConf.create()
        if not OmegaConf.is_dict(base):
            raise ConfigError(f"{file} must hold a mapping of sections, got {type(base).__name__}")
        merged = OmegaConf.merge(OmegaConf.from_dotlist(list(defaults)), base, OmegaConf.from_dotlist(dotlist))
        tree = OmegaConf.to_container(merged, resolve=True)
    except ConfigError:
        raise
    except (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        # ValueError: a file that is no UTF-8, or a 13th month
        raise ConfigError(f"cannot read the configuration {file or ''} {' '.join(overrides)}: {error}") from error
    return dict(tree) if isinstance(tree, dict) else {}


def _read(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    if first.startswith(HASH_LINE) and first.removeprefix(HASH_LINE) != hashlib.sha256(rest.encode()).hexdigest():
        raise ConfigError(
            f"{file} must match the hash in its first line: it was damaged or edited; give changes as key=value, or remove the"
            " line to have the file read as it is"
        )
    return text


def _expand(override: str, kind: type[Section]) -> list[str]:
    """An override with its key in full; model=PATH is one of both models."""
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"an override is written key=value, got {override!r}")
    if key in kind.model_fields and section_in(kind.model_fields[key].annotation) is ModelConfig and not value.startswith("{"):
        return [f"{key}.{name}={value}" for name in ("policy", "reward")]
    if "." in key or key in kind.model_fields:
        return [override]
    owners = [name for name, *_ in options(kind) if name.rsplit(".", 1)[-1] == key]
    if len(owners) > 1:
        raise ConfigError(f"{key}: several options have this name: {', '.join(owners)}")
    return [f"{owners[0]}={value}" if owners else override]


def validate_tree(kind: type[Tree], tree: Any) -> Tree:
    """A `kind` from plain data, or a ConfigError that lists every fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault, kind) for fault in error.errors())) from error


load_config, validate = partial(load_tree, Config), partial(validate_tree, Config)  # of a run


def _explain(fault: Any, kind: type[Section]) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{key}: must be given"
    if fault["type"] != "extra_forbidden":
        rule = fault["msg"].removeprefix("Value error, ")
        return f"{key}: {rule}" + ("" if ", got " in rule else f", got {fault['input']!r}") if key else rule
    known = [name for name, *_ in options(kind)]
    sections = sorted({name.rsplit(".", 1)[0] for name in known if "." in name})
    nearest = difflib.get_close_matches(key, known + sections, n=1, cutoff=0.4)
    return f"{key}: unknown key" + (f"; did you mean {nearest[0]}?" if nearest else "")


def dump_config(config: Section, path: Path) -> None:
    """Write the resolved configuration as YAML, under a line with its hash."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    text = f"{HASH_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
