"""Options as a user gives them: a file, overrides over it, checked as one tree; and the resolved tree written back.

What is written back begins with a line that holds its hash, which is compared on reading: a run that goes on must not do so
under options that a damaged disk changed.
"""

from __future__ import annotations

import difflib
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from causalrm_ray.config.base import RunFolder, Section
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError
from causalrm_ray.files import write_whole

Tree = TypeVar("Tree", bound=Section)
HASH_LINE = "# sha256 of the lines below: "


def options(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Every option below `section` as (dotted key, type, default, meaning)."""
    for name, info in section.model_fields.items():
        key = f"{prefix}{name}"
        default = "must be given" if info.is_required() else info.get_default(call_default_factory=True)
        if isinstance(default, Section):
            yield from options(type(default), f"{key}.")
        else:
            kind = str(info.annotation) if not isinstance(info.annotation, type) else info.annotation.__name__
            yield key, kind.replace("typing.", "").replace("pathlib.", ""), default, info.description or ""


def load_config(file: str | Path | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()) -> Config:
    """The configuration of a run: see `load_tree`."""
    return load_tree(Config, file, overrides, defaults)


def load_tree(kind: type[Tree], file: str | Path | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()) -> Tree:
    """Lay a YAML file over `key=value` defaults, and overrides over both, and validate as a `kind`.

    A key may leave out its section where only one option bears the name: `resume=true` is `run.resume=true`.
    Raises ConfigError that names the key (and the nearest right one), the rule and the value.
    """
    return validate_tree(kind, _merge(kind, file, overrides, defaults))


def find_run(
    kind: type[Section], file: str | Path | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()
) -> RunFolder:
    """The folder of a run, from the same sources; whatever else they hold is not looked at. Raises ConfigError."""
    run = _merge(kind, file, overrides, defaults).get("run", {})
    told = {name: run[name] for name in RunFolder.model_fields if name in run} if isinstance(run, dict) else run
    return validate_tree(_Where, {"run": told}).run


class _Where(Section):
    run: RunFolder = RunFolder()


def _merge(kind: type[Section], file: str | Path | None, overrides: Sequence[str], defaults: Sequence[str]) -> dict[Any, Any]:
    dotlist = [_expand(item, kind) for item in overrides]
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
            f"{file} must match the hash in its first line: it was damaged or edited; give changes as key=value, or take the line"
            " off to have it read as it is"
        )
    return text


def _expand(override: str, kind: type[Section]) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"an override is written key=value, got {override!r}")
    if "." in key or key in kind.model_fields:
        return override
    owners = [name for name, *_ in options(kind) if name.rsplit(".", 1)[-1] == key]
    if len(owners) > 1:
        raise ConfigError(f"{key}: several options bear this name: {', '.join(owners)}")
    return f"{owners[0]}={value}" if owners else override


def validate(tree: Any) -> Config:
    """A Config from plain data: see `validate_tree`."""
    return validate_tree(Config, tree)


def validate_tree(kind: type[Tree], tree: Any) -> Tree:
    """A `kind` from plain data, or a ConfigError that lists every fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault, kind) for fault in error.errors())) from error


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
