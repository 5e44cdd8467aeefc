import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from launch.rows import BUILTIN, load_splits

ROW = {"instruction": "What is 2 and 3?", "output": "2 + 3 = 5. The answer is 5.", "answer": "5"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_file_of_each_kind_gives_its_rows(tmp_path: Path, ending: str) -> None:
    rows = [{**ROW, "instruction": f"Question {index}"} for index in range(20)]
    splits = load_splits(str(write(tmp_path / f"rows{ending}", rows)))
    read = [*splits["train"].rows, *splits["test"].rows]
    assert [row["instruction"] for row in read] == [row["instruction"] for row in rows]
    assert [row["output"] for row in read] == [ROW["output"]] * 20
    assert len(splits["test"]) == 2  # a tenth is held out


def test_a_folder_with_train_and_test_is_recognised(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [ROW] * 3)
    write(tmp_path / "test.jsonl", [ROW] * 2)
    splits = load_splits(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 2}


def test_a_folder_may_hold_test_rows_only(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [ROW] * 2)
    assert list(load_splits(str(tmp_path))) == ["test"]


def test_builtin_rows() -> None:
    splits = load_splits(BUILTIN)
    assert len(splits["train"]) == 2000
    assert splits["test"].rows[0]["output"].endswith(f"The answer is {splits['test'].rows[0]['answer']}.")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", "", "empty.jsonl: the file is empty"),
        ("broken.jsonl", '{"instruction": ', "broken.jsonl: not readable as json"),
        ("rows.txt", "hello", r"rows.txt: cannot read \.txt"),
        ("none.json", "[]", "none.json"),
        (
            "field.jsonl",
            json.dumps(ROW) + "\n" + json.dumps({"instruction": "Only this", "answer": "1"}),
            r"field.jsonl: row 1 has no text in output; .*\(fields found: answer, instruction\)",
        ),
        ("other.jsonl", json.dumps({"prompt": "a", "reply": "b"}), r"row 0 has none .*found: prompt, reply\)"),
        ("blank.jsonl", json.dumps({**ROW, "output": "  "}), "row 0 has no text in output"),
        ("blank_text.jsonl", json.dumps({"text": ""}), "row 0 has no text in text"),
        (
            "turns.jsonl",
            json.dumps({"messages": [{"role": "user", "content": "hi"}]}),
            "row 0 does not end with a message from the assistant",
        ),
    ],
)
def test_mistakes_name_file_row_and_fields(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        load_splits(str(tmp_path / name))


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/rows.jsonl", "rows.jsonl", "builtin:poetry"])
def test_a_missing_source_is_named(source: str) -> None:
    with pytest.raises(ValueError, match=source):
        load_splits(source)


def test_a_folder_without_rows_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match=r"no train or test file.*notes\.md"):
        load_splits(str(tmp_path))
