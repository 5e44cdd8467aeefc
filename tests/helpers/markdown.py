# SPDX-License-Identifier: Apache-2.0
"""Markdown as tests read it: tables, code blocks."""

import re


def lines_of(text: str) -> list[dict[str, str]]:
    """The lines of a table, by the names of its columns."""
    names, _, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(names, [*cells, ""], strict=False)) for cells in lines]


def lines_under(title: str, blocks: list[str]) -> list[dict[str, str]]:
    """Those of the one block with this title."""
    (found,) = [block for block in blocks if block.startswith(f"### {title}\n")]
    return lines_of(found)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
