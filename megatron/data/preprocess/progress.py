"""How far preprocessing is: a bar on a terminal, Megatron's lines in a log."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

from tqdm import tqdm

_MEGABYTE = 1e6


class Progress:
    """Counts documents and bytes, and says so on a stream."""

    def __init__(self, stream: TextIO, *, total_bytes: int, log_interval: int) -> None:
        """Start the clock.

        Args:
            stream: where to write.
            total_bytes: size of all inputs on disk.
            log_interval: documents between two lines, where the stream is no terminal.
        """
        self._stream = stream
        self._interval = log_interval
        self._next = log_interval
        self._start = time.monotonic()
        self.documents = 0
        self.text_bytes = 0
        self.tokens = 0
        self.consumed = 0
        self._total = total_bytes
        size = shutil.get_terminal_size()
        self._bar = tqdm(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            file=stream,
            disable=not stream.isatty(),
            mininterval=0.5,
            # Where a terminal says that it has no size (inside some containers), tqdm would draw nothing.
            ncols=size.columns,
            nrows=size.lines,
        )

    def add(self, *, documents: int, text_bytes: int, tokens: int, consumed: int) -> None:
        """Count a chunk."""
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens
        self.consumed += consumed
        if not self._bar.disable:
            _, megabytes, tokens = self._rates()
            state = f"{self.documents:,} documents, {megabytes:.2f} MB/s, {tokens:,.0f} tokens/s"
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(consumed)
        elif self.documents >= self._next:
            self._next = (self.documents // self._interval + 1) * self._interval
            print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """The state so far, in Megatron's words. MB are 10^6 bytes of text, decompressed."""
        documents, megabytes, tokens = self._rates()
        done = f"Processed {self.documents} documents ({documents:.1f} docs/s, {megabytes:.2f} MB/s)."
        left = self._seconds_left()
        return f"{done} {tokens:.0f} tokens/s" + ("." if left is None else f", {left:.0f} s left.")

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()

    def _rates(self) -> tuple[float, float, float]:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return self.documents / seconds, self.text_bytes / seconds / _MEGABYTE, self.tokens / seconds

    def _seconds_left(self) -> float | None:
        if not 0 < self.consumed < self._total:
            return None
        return (time.monotonic() - self._start) * (self._total - self.consumed) / self.consumed
