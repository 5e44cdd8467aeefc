"""Generate answers, and find out how long they may get."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, StoppingCriteria

from launch import distributed
from launch.data.chat_template import IGNORED_LABEL, Template
from launch.data.rows import Rows


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


def longest_answer(template: Template, rows: Rows) -> int:
    """A limit for generated tokens: a quarter more than the rows' longest answer, end token included.

    256 if a row has no worked answer: how long one may be is then unknown.

    Raises:
        ValueError: a row that the template refuses; the source and the row are named.
    """
    if any(row.get("output") is None and row.get("messages") is None for row in rows.rows):
        return 256
    return math.ceil(1.25 * max(rows.each(lambda row: _last_answer(template.encode(row)[1]))))


def _last_answer(labels: Sequence[int]) -> int:
    """How many tokens of a row's last answer are trained: reasoning, content, tool calls, and all that ends it."""
    return sum(1 for _ in itertools.takewhile(lambda label: label != IGNORED_LABEL, reversed(labels)))


def generate(
    model: PreTrainedModel, template: Template, prompts: list[list[int]], max_new_tokens: int, progress: Progress
) -> list[str]:
    """The greedy continuations of some prompts, padded on the left to one length."""
    tokenizer = template.tokenizer
    longest = max(len(prompt) for prompt in prompts)
    ids = [[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    configured = model.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    known_ends, before = sorted(end for end in ends if end is not None), progress.finished
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=known_ends or None,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[_RowsDone(progress, longest, known_ends)],
    )
    progress.reach(before + len(prompts))
    return list(tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True))


class _RowsDone(StoppingCriteria):
    """Shows rows that have ended while others of their batch go on. `generate` stops when all have ended."""

    def __init__(self, progress: Progress, prompt_length: int, ends: list[int]) -> None:
        self._progress, self._start, self._ends = progress, prompt_length, ends
        self._before = progress.finished

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """`input_ids`: prompts and what follows, int64 (rows, length)."""
        new = input_ids[:, self._start :]
        ended = torch.isin(new, torch.tensor(self._ends, device=new.device)).any(dim=1)
        self._progress.reach(self._before + int(ended.sum()), f"token {new.shape[1]}")
        return torch.zeros(len(new), dtype=torch.bool, device=new.device)
