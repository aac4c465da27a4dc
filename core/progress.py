"""Progress with the time left: rich's bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_SECONDS = 30.0


class Bar:
    """Counts steps; `advance` shows where a piece of work stands, `log` leaves a line."""

    def __init__(self, live: Progress, label: str, total: int, done: int, quiet: bool) -> None:
        self._live, self._label, self._quiet = live, label, quiet
        self._task = live.add_task(label, total=total, completed=done, note="")
        self._shown = time.monotonic()

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Another `steps` are done; into a log this prints a line every half minute."""
        self._live.update(self._task, advance=steps, note=note)
        now = time.monotonic()
        if not self._live.console.is_terminal and now - self._shown > LOG_SECONDS:
            self._shown = now
            task = self._live.tasks[0]
            left = f", {task.time_remaining:.0f} s left" if task.time_remaining is not None else ""
            self.log(f"{self._label} {task.completed:.0f}/{task.total:.0f} ({task.percentage:.0f} %{left})  {note}")

    def log(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(label: str, total: int, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """A progress bar with the time left for `total` steps, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    # steps differ in length, so the time left follows the last minutes and not the last seconds
    live = Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal, speed_estimate_period=300
    )
    with live:
        yield Bar(live, label, total, done, quiet)
