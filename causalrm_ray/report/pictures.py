"""Shared by all pictures: colours, and a row of panels as a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


def picture(panels: Sequence[Callable[[Axes], None]]) -> str:
    """A PNG, as a data URI, of panels side by side, each drawn by its function."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
