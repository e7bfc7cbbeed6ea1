"""What roles start with, and what they give back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from actors.cluster.environment import KEEP_FREED

MIB = 1 << 20
FIT = f"""
import psutil
import torch

from actors.cluster.environment import give_back_freed

def held():
    return psutil.Process().memory_info().rss // {MIB}

before = held()
kept = []
for _ in range(200):  # as a fit leaves it: what stays lies behind what was freed
    freed = torch.ones({MIB // 4})
    kept.append(torch.ones(16))
    parts = [torch.ones({MIB // 4}) for _ in range(2)]
    kept.append(parts)
del freed, parts
after = [held() - before]
kept = [part for part in kept if isinstance(part, torch.Tensor)]
after.append(held() - before)
give_back_freed()
after.append(held() - before)
print(*after)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone can trim")
def test_a_fit_gives_back_what_a_role_would_keep() -> None:
    done = subprocess.run([sys.executable, "-c", FIT], env=os.environ | KEEP_FREED, capture_output=True, text=True, check=True)
    used, kept, left = map(int, done.stdout.split())
    assert used > 380
    assert kept > 0.8 * used  # the reason for giving it back
    assert left < 0.2 * used
