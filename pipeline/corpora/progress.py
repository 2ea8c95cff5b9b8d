"""Progress that is seen: a bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from types import TracebackType

INTERVAL_S = 10.0


class Progress:
    """Counts done units of `total` (None: unknown) and shows them; a context manager."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._began = self._shown = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True)

    def add(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._shown >= INTERVAL_S:
            self._line()

    def _line(self) -> None:
        self._shown = time.monotonic()
        elapsed = self._shown - self._began
        text = f"{self.what}: {self.done:,}"
        if self.total:
            text += f" of {self.total:,}"
            if 0 < self.done < self.total:
                text += f" {self.unit}, about {elapsed / self.done * (self.total - self.done):.0f} s left"
            else:
                text += f" {self.unit}, {elapsed:.1f} s"
        else:
            text += f" {self.unit}, {elapsed:.1f} s"
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()
