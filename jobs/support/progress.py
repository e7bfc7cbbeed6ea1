"""Terminal output of a job: its phases with their start times, a progress bar over steps, and key metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from actors.cluster.telemetry import event, step_now
from actors.placement_plan import Plan

if TYPE_CHECKING:
    from actors.features.states import StatesDone

console = Console(highlight=False)
LINES = 10  # printed lines per bar where the output is no terminal


class Progress:
    """One bar at a time, and a line per phase."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        texts = (TextColumn("{task.description:20}"), TextColumn("{task.fields[figures]}"))
        self._bars = RichProgress(texts[0], *columns, texts[1], console=console, disable=not console.is_terminal)
        self._bar: TaskID | None = None
        self._total = self._done = 0
        self._first_states: tuple[float, int] | None = None  # when the first were done, and the tokens by then

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def phase(self, name: str) -> None:
        """Print and log the phase that begins."""
        event("phase", name=name)
        self._say(name)

    def _say(self, name: str) -> None:
        console.print(f"[dim]{time.perf_counter() - self._began:7.1f} s[/]  {escape(name)}")

    def pretraining(self, step: int, steps: int, loss: float) -> None:
        """A step of the embedded policy's pretraining."""
        if step == 1:
            self._open("embedded policy", steps)
        self.task(step, f"loss {loss:.2f}")

    def plan(self, plan: Plan) -> None:
        """Print where the roles will run, and their estimated memory."""
        shared = " (shared)" if plan.colocated else ""
        table = Table("role", "runs on", "memory, about", box=None, pad_edge=False)
        for role, allocation in plan.allocations.items():
            where = "CPU" if allocation.bundle is None else f"{allocation.gpus:.3g} GPU of group {allocation.bundle}{shared}"
            table.add_row(role, where, f"{allocation.bytes / 2**30:.2f} GiB")
        table.add_row("all without a GPU", "", f"{plan.host_bytes / 2**30:.2f} GiB")
        if "generator-0" in plan.allocations and "learner-0" in plan.allocations:
            table.add_row("weight sync", f"by {plan.transport}", "")
        console.print(table)

    def steps(self, first: int, last: int) -> Iterator[int]:
        """The policy steps first..last-1, with a bar."""
        self.phase(f"tuning the policy, steps {first} to {last}")
        self._open("policy steps", last, first)
        for step in range(first, last):
            step_now.set(step)
            yield step
        step_now.set(None)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A policy step is done."""
        event("step", figures=dict(metrics))
        shown = {"reward": "reward", "oracle": "oracle_mean", "kl": "kl", "mismatch": "logprob_mismatch_max_abs"}
        self.task(step + 1, "  ".join(f"{name} {metrics[key]:.3g}" for name, key in shown.items() if key in metrics))

    def tasks(self, name: str, total: int) -> None:
        """`total` tasks begin, completed in any order."""
        self.phase(f"{name}: {total} to do")
        self._open(name, total)

    def states(self, done: StatesDone) -> None:
        """States of some rows were computed; nothing is said where none are missing."""
        if not done.missing:
            return
        if self._first_states is None:
            self.phase(f"computing states of {done.missing} answers")
            self._open("answers", done.missing)
            self._first_states = time.perf_counter(), done.tokens
        began, tokens = self._first_states
        figures = f"{(done.tokens - tokens) / (time.perf_counter() - began):.0f} tokens/s" if done.tokens > tokens else ""
        self.task(done.rows, figures)

    def conclude(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """Print the run's result in a few lines."""
        oracle = summary.get("oracle_reward")
        if oracle:
            console.print(
                f"oracle reward on held-out topics: {oracle['before']:.2f} -> {oracle['after']:.2f} (se {oracle['stderr']:.2f})"
            )
        console.print(
            f"{summary['wall_s']:.0f} s, peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB; see {folder / 'report.html'}"
        )

    def _open(self, name: str, total: int, completed: int = 0) -> None:
        self._total, self._done = total, completed
        self._bar = self._bars.add_task(name, total=total, completed=completed, figures="")

    def task(self, done: int, figures: str) -> None:
        """`done` tasks, or steps, are complete."""
        if self._bar is not None:
            self._bars.update(self._bar, completed=done, figures=figures)
        lines, self._done = LINES * self._done // max(1, self._total), done
        if not console.is_terminal and LINES * done // max(1, self._total) > lines:
            self._say(f"  {done}/{self._total}  {figures}")
