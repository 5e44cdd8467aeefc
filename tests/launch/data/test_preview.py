"""What is shown of the training rows before the training starts."""

import io
import json
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from helpers import tokenizers
from helpers.programs import in_memory, torchrun, train
from transformers import PreTrainedTokenizerBase

from launch.data import preview
from launch.data.chat_template import IGNORED_LABEL, Template
from launch.data.tokenization import tokenize

CHATML = tokenizers.byte_level(tokenizers.CHATML)
ROW = {"instruction": "the capital", "output": "Paris"}


def shown(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> list[str]:
    return preview.show_row(tokenizer, *Template.choose(tokenizer).encode(row)).splitlines()


def encoded(*rows: dict[str, str]) -> datasets.Dataset:
    table = [dict.fromkeys(("instruction", "output", "text")) | row for row in rows]
    return tokenize(in_memory(table), Template.choose(CHATML), 4096)


def test_a_row_is_shown_with_what_is_trained() -> None:
    assert shown(CHATML, ROW) == [
        "36 tokens, 6 of them trained (16.7%)",
        "  given | <|im_start|>user\\n",
        "  given | the capital<|im_end|>\\n",
        "  given | <|im_start|>assistant\\n",
        "trained | Paris<|im_end|>",
    ]


def test_spaces_at_the_start_of_a_piece_are_shown() -> None:
    """A decoder drops the first space of what it is given."""
    assert shown(tokenizers.sentencepiece(None), ROW)[1:] == [
        "  given | <s> User: the capital\\n",
        "  given | \\n",
        "  given | Assistant:",
        "trained |  Paris</s>",
    ]


def test_control_characters_are_escaped_and_what_a_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(CHATML, {"instruction": "\x1b[31mred\x07\r\tend\u202e", "output": "ü 😀"})
    assert "  given | \\x1b[31mred\\x07\\r" in lines
    assert "  given | \\tend\\u202e<|im_end|>\\n" in lines
    assert lines[-1] == "trained | ü 😀<|im_end|>"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert "trained | \\xfc \\U0001f600<|im_end|>" in preview.show(CHATML, encoded({**ROW, "output": "ü 😀"}), 1)


def test_a_long_row_is_shortened_in_the_middle() -> None:
    start, end = "first words ", " last words"
    lines = shown(CHATML, {"instruction": start + "x" * 100_000 + end, "output": "\n".join(map(str, range(1000)))})
    text = "\n".join(lines)
    assert len(lines) <= 42
    assert all(len(line) <= 130 for line in lines)
    assert "first words" in text
    assert "999<|im_end|>" in text
    assert "lines ...]" in text
    lines = shown(CHATML, {"instruction": start + "x" * 100_000 + end, "output": "a"})[1:]
    alone = "".join(line[10:] for line in lines)
    assert "first words xxx" in alone
    assert "xxx last words" in alone
    assert "characters ...]" in alone


def test_the_whole_training_set_is_counted() -> None:
    rows = encoded(ROW, {"text": "abc"}, {**ROW, "output": "P"})
    labels = [label for row in rows for label in row["labels"]]
    count = preview.count_tokens(rows)
    assert (len(labels), sum(label != IGNORED_LABEL for label in labels)) == (72, 6 + 4 + 2)
    assert count == {"all": 72, "trained": 12, "trained_share": pytest.approx(12 / 72)}
    # Also of rows that were selected, and of many.
    assert preview.count_tokens(rows.select([1]))["trained"] == 4
    many = encoded(*[ROW] * 2500).select(range(1, 2500))
    assert preview.count_tokens(many) == {"all": 2499 * 36, "trained": 2499 * 6, "trained_share": 6 / 36}


def test_the_first_rows_are_shown() -> None:
    rows = encoded(ROW, {"text": "abc"}, ROW)
    text = preview.show(CHATML, rows, 2)
    assert "training row 1 of 3: 36 tokens" in text
    assert "training row 2 of 3: 4 tokens, 4 of them trained (100.0%)\ntrained | abc<|im_end|>" in text
    assert "row 3 of 3" not in text
    assert text.splitlines()[-1] == "all 3 training rows: 76 tokens, 16 of them trained (21.1%)"
    assert "row 3 of 3" in preview.show(CHATML, rows, 99)


@pytest.mark.dist
def test_inspect_shows_rows_and_ends_without_the_weights(model_folder: Path, tmp_path: Path) -> None:
    """All ranks end with 0, and one of them speaks."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    rows = [{"instruction": f"say {i}", "output": f"word {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--deepspeed", "ds_configs/grass.json", "--model", str(folder), "--inspect", "2"]
    done = train(torchrun(2), [*options, "--data", str(tmp_path / "rows.jsonl")], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if not line.startswith("precision")]
    said = [line.split(":")[0] for line in lines if line.startswith(("training row", "all"))]
    assert said == ["training row 1 of 4", "training row 2 of 4", "all 4 training rows"]
    assert "trained | word 1<|end|>" in lines
    assert not (tmp_path / "out" / "report.json").exists()
