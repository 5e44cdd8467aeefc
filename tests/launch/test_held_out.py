"""Which rows launch/train.py trains on, which it and launch/evaluate.py measure, and what they say about them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import arguments, evaluate
from launch.preparation import load_data


def options(data: Path, eval_data: Path | None = None, encoding: str = "utf-8", **evaluation: Any) -> Any:
    return SimpleNamespace(
        data=arguments.DataArguments(
            data=str(data), eval_data=None if eval_data is None else str(eval_data), encoding=encoding
        ),
        evaluation=arguments.EvalArguments(**evaluation),
    )


def write(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"instruction": f"q{i}", "output": "x"}) + "\n" for i in range(count)))
    return path


def test_held_out_rows_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = load_data(options(write(tmp_path / "rows.jsonl", 40)))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 36, "test": 4}
    said = capsys.readouterr().out
    assert said.startswith("data: training on all 36 rows of ")
    assert "these 4 of 40 rows are held out of training" in said
    assert said.count("\n") == 1
    assert list(load_data(options(tmp_path / "rows.jsonl", eval_task="none"))) == ["train"]
    assert capsys.readouterr().out.endswith("; nothing is measured\n")


def test_eval_data_is_measured_whole_and_nothing_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, test = write(tmp_path / "rows.jsonl", 40), write(tmp_path / "mytest.jsonl", 500)
    splits = load_data(options(rows, test, eval_samples=1000))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 40, "test": 500}
    training = f"data: training on all 40 rows of {rows}; measuring on"
    assert capsys.readouterr().out == f"{training} all 500 rows of {test}\n"
    load_data(options(rows, test))
    assert capsys.readouterr().out == f"{training} the first 64 of 500 rows of {test} (--eval_samples)\n"


def test_test_rows_that_eval_data_replaces_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", 40)
    replaced, test = write(tmp_path / "folder" / "test.jsonl", 5), write(tmp_path / "mine.jsonl", 7)
    assert len(load_data(options(tmp_path / "folder", test))["test"]) == 7
    said = capsys.readouterr().out
    assert said.endswith(f"on all 7 rows of {test}; not read: {replaced} (--eval_data takes its place)\n")


def test_the_encoding_holds_for_both_sources(tmp_path: Path) -> None:
    for name in ("rows.csv", "test.csv"):
        (tmp_path / name).write_bytes("instruction,output\ncafé,a\n".encode("latin-1"))
    splits = load_data(options(tmp_path / "rows.csv", tmp_path / "test.csv", encoding="latin-1"))
    assert [rows.rows[0]["instruction"] for rows in splits.values()] == ["café", "café"]


def test_test_rows_alone_cannot_be_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", 5)
    with pytest.raises(ValueError, match="has test rows only; give a source with training rows"):
        load_data(options(tmp_path))


@pytest.mark.parametrize(("split", "count"), [("test", 30), ("train", 30), ("held_out", 3)])
def test_evaluate_measures_the_whole_file_unless_told_otherwise(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, count: int
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(("instruction,output\n" + "café,a b\n" * 30).encode("latin-1"))
    asked = evaluate.Arguments(
        model=str(model_folder), data=str(path), encoding="latin-1", split=split, task="loss", dtype="fp32"
    )
    assert evaluate.run(asked)["rows"] == count
    assert f"data: measuring on all {count} rows of {path}" in capsys.readouterr().out
