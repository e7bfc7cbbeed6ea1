"""A job's options as tables for its help, one for each section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from causalrm_ray.config.base import Section
from causalrm_ray.config.options import Option, options, section_in


def option_tables(tree: type[Section], first: Sequence[str] = ()) -> Iterator[RenderableType]:
    """A heading and a table per section: options outside of any section, the sections in `first`, then the others."""
    sections: dict[str, list[Option]] = {"": [], **{name: [] for name in first}}
    for option in options(tree):
        sections.setdefault(option.key.split(".")[0] if "." in option.key else "", []).append(option)
    for name, members in sections.items():
        if not members:
            continue
        kind = section_in(tree.model_fields[name].annotation) if name else tree
        yield Text.assemble(
            "\n", (name or "options", "bold"), f": {(kind.__doc__ or '').strip().splitlines()[0]}" if kind else ""
        )
        table = Table(box=None, pad_edge=False)
        table.add_column("option", style="cyan", no_wrap=True)
        table.add_column("default", overflow="fold", max_width=24)
        table.add_column("meaning", overflow="fold")
        for option in members:
            table.add_row(option.key, Text(option.default), Text.assemble(option.meaning, " ", (f"({option.kind})", "dim")))
        yield table
