"""Commands: the only place that decides order, and prints."""

from __future__ import annotations

import sys
from pathlib import Path

# Our other packages are those beside this one, even where the working folder holds modules with their names and comes first on
# the search path. It is searched last, too: there a user keeps what a configuration names by import path.
sys.path.insert(0, _root := str(Path(__file__).resolve().parents[1]))
try:
    import actors
    import causalrm_ray
finally:
    sys.path.remove(_root)
    sys.path.append("")

for _package in (actors, causalrm_ray):
    if not str(_package.__file__).startswith(_root):
        raise ImportError(f"{_package.__file__} has the name of a package of causalrm-ray and took its place: rename it")
