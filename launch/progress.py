"""A progress bar that counts one rank's share of the work."""

from __future__ import annotations

import time

from tqdm import tqdm

from launch import distributed


class Progress:
    """A bar on rank 0 that counts the rows of its own share; the other ranks have as many, up to one."""

    def __init__(self, what: str, total: int, unit: str = "row") -> None:
        ranks = distributed.world_size()
        label = f"Evaluating {what}" + (f" (1 of {ranks} ranks)" if ranks > 1 else "")
        hidden = distributed.rank() != 0
        self._bar = tqdm(total=total, desc=label, unit=unit, disable=hidden, leave=False, mininterval=1.0)
        self.finished = 0
        self._drawn = time.monotonic()

    def reach(self, finished: int, detail: str = "") -> None:
        """Show that so many rows are finished; `detail`: where the others are."""
        finished = min(finished, self._bar.total)  # a rank repeats rows for the others' sake
        self._bar.set_postfix_str(detail, refresh=False)
        # Rows end rarely, tokens come often: the bar is drawn at most once a second.
        if not self._bar.update(finished - self.finished) and time.monotonic() - self._drawn > 1.0:
            self._bar.refresh()
            self._drawn = time.monotonic()
        self.finished = finished

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
