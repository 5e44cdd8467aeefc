import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from launch.data import formats, messages, records, row_table, text_files, values
from launch.data.messages import conversation
from launch.data.rows import not_read, summary
from launch.data.sources import BUILTIN, load_measured, load_splits, load_test

ROW = {"instruction": "What is 2 and 3?", "output": "2 + 3 = 5. The answer is 5.", "answer": "5"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{**ROW, "instruction": f"Question {index}", **more} for index in range(count)]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_file_of_each_kind_gives_its_rows(tmp_path: Path, ending: str) -> None:
    rows = numbered(20)
    splits = load_splits(str(write(tmp_path / f"rows{ending}", rows)))
    read = [*splits["train"].rows, *splits["test"].rows]
    assert [{key: row[key] for key in ROW} for row in read] == rows
    assert len(splits["test"]) == 2  # a tenth is held out


TABLE, LINE = "instruction{0}output\ncafé{0}02134\n", '{"instruction": "café", "output": "02134"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, LINE) for name in ("a.jsonl.gz", "A.JSONL.GZ", "a.json.zst", "a.JSONL")),
        ("a.csv.gz", TABLE.format(",")),
        ("a.TSV.zst", TABLE.format("\t")),
        ("a.CSV", TABLE.format(";")),
    ],
)
def test_packed_files_and_upper_case_endings_are_read_in_their_encoding(
    tmp_path: Path, name: str, content: str
) -> None:
    packing = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix.lower())
    with pa.output_stream(str(tmp_path / name), compression=packing) as stream:
        stream.write(content.encode("utf-16-le"))
    rows = load_splits(str(tmp_path / name), encoding="utf-16-le")["train"].rows
    assert (rows[0]["instruction"], rows[0]["output"]) == ("café", "02134")


def test_builtin_rows() -> None:
    splits = load_splits(BUILTIN)
    assert len(splits["train"]) == 2000
    assert splits["test"].rows[0]["output"].endswith(f"The answer is {splits['test'].rows[0]['answer']}.")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", "", "empty.jsonl: the file is empty"),
        ("blank.jsonl", "\n\n", "blank.jsonl: the file holds no rows"),
        ("header.csv", "instruction,output\n", "header.csv: the file holds no rows"),
        ("rows.txt", "hello", r"rows.txt: cannot read \.txt; use one of .*\.jsonl"),
        ("none.json", "[]", "none.json: the file holds no rows"),
        (
            "field.jsonl",
            json.dumps(ROW) + "\n" + json.dumps({"instruction": "Only this", "answer": "1"}),
            r"field.jsonl: row 1 \(line 2\) has no text in output .*\(fields found: answer, instruction\)",
        ),
        ("other.jsonl", json.dumps({"a": "a", "reply": "b"}), r"row 0 \(line 1\) has none .*found: a, reply\)"),
        ("blank.json", json.dumps([{**ROW, "output": "  "}]), r"blank.json: row 0 has no text in output \(empty"),
        ("blank_text.jsonl", json.dumps({"text": ""}), r"row 0 \(line 1\) has no text in text \(empty\)"),
    ],
)
def test_mistakes_name_file_row_and_fields(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        load_splits(str(tmp_path / name))


def test_a_missing_source_or_encoding_is_named() -> None:
    for source in ("./nowhere", "/no/such/rows.jsonl", "rows.jsonl", "rows.JSONL.gz", "builtin:poetry"):
        with pytest.raises(ValueError, match=source):
            load_splits(source)
    with pytest.raises(ValueError, match="--encoding 'utf-9': no such text encoding; use for example utf-8"):
        load_splits("rows.csv", encoding="utf-9")


def test_rows_are_read_anew_when_the_file_or_the_program_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for count in (1, 2):
        write(path, numbered(count))
        assert len(load_splits(str(path))["train"]) == count
    before = {load_splits(str(path))["train"].rows._fingerprint for _ in range(2)}
    assert len(before) == 1
    for module in (row_table, text_files, records, formats, values, messages):
        changed = tmp_path / "changed.py"
        changed.write_bytes(Path(str(module.__file__)).read_bytes() + b"# changed")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(module, "__file__", str(changed))
            assert load_splits(str(path))["train"].rows._fingerprint not in before, module


# ---- where a row is named ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "line"), [(".jsonl", " (line 96)"), (".csv", " (line 97)"), (".parquet", "")])
def test_a_held_out_row_is_named_as_the_file_counts_it(tmp_path: Path, ending: str, line: str) -> None:
    path = write(tmp_path / f"rows{ending}", numbered(100))
    for source in (str(path), f"{tmp_path}/./rows{ending}"):  # read, and taken from the cache
        splits = load_splits(source)
        assert splits["test"].where(5) == f"{Path(source)}: row 95{line}"
        assert splits["test"].take(6).where(5) == splits["test"].where(5)
        assert splits["test"].source == f"{Path(source)} (rows from 90)"
        assert splits["train"].where(3).startswith(f"{Path(source)}: row 3")


def test_a_row_of_several_files_is_counted_in_its_own(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path / f"train-{index}-of-3.jsonl", numbered(10 + index))
    splits = load_splits(str(tmp_path))
    assert splits["train"].where(10) == f"{tmp_path}/train-1-of-3.jsonl: row 0 (line 1)"
    assert splits["test"].where(2) == f"{tmp_path}/train-2-of-3.jsonl: row 11 (line 12)"
    write(tmp_path / "train-1-of-3.jsonl", [ROW, {"instruction": "q", "output": ""}])
    with pytest.raises(ValueError, match=r"train-1-of-3\.jsonl: row 1 \(line 2\) has no text in output"):
        load_splits(str(tmp_path))


def test_a_row_that_no_file_holds_is_named_by_its_source(tmp_path: Path) -> None:
    assert load_splits(BUILTIN)["test"].where(7) == "builtin:arithmetic/test: row 7"
    datasets.Dataset.from_list(numbered(30)).save_to_disk(tmp_path / "saved")
    assert load_splits(str(tmp_path / "saved"))["test"].where(1) == f"{tmp_path}/saved/train: row 28"


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["set[1].jsonl", "a*.jsonl", "a?.jsonl", "[ab]/train.jsonl", "**/train.jsonl"])
def test_signs_in_a_name_mean_themselves(tmp_path: Path, name: str) -> None:
    for other in ("set1.jsonl", "ab.jsonl", "a/train.jsonl"):
        write(tmp_path / other, [{"instruction": "another file", "output": "x"}])
    path = write(tmp_path / name, [{"instruction": "this file", "output": "x"}])
    source = path if path.parent == tmp_path else path.parent
    assert load_splits(str(source))["train"].rows["instruction"] == ["this file"]


# ---- test rows ------------------------------------------------------------------------------------------------------


def test_a_file_given_as_test_data_is_measured_whole(tmp_path: Path) -> None:
    path = str(write(tmp_path / "mytest.jsonl", numbered(500)))
    assert len(load_test(path)) == 500
    assert [len(load_measured(path, split)) for split in ("test", "train", "held_out")] == [500, 500, 50]
    assert load_measured(path, "held_out").rows[0]["instruction"] == "Question 450"


def test_a_folder_or_dataset_given_as_test_data_needs_test_rows(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", numbered(20))
    with pytest.raises(ValueError, match=r"has training rows only .*train\.jsonl.*name the file.*called test, valid"):
        load_test(str(tmp_path))
    write(tmp_path / "val.jsonl", numbered(30))
    assert len(load_test(str(tmp_path))) == 30
    with pytest.raises(ValueError, match=r"no held_out rows, only test \(30 rows\), train \(20 rows\)"):
        load_measured(str(tmp_path), "held_out")
    with pytest.raises(ValueError, match="--split 'dev': choose test, train or held_out"):
        load_measured(str(tmp_path), "dev")


def test_the_summary_counts_what_is_trained_on_measured_and_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(40))
    splits = load_splits(str(path))
    assert summary(splits["train"], None, splits["test"], 64) == (
        f"training on all 36 rows of {path}; measuring on all 4 rows of {path} (rows from 36); these 4 of 40 rows are "
        "held out of training; name test rows with --eval_data to train on all"
    )
    train, test = load_splits(str(path), hold_out=False)["train"], load_test(str(path))
    assert summary(train, 10, test, 5) == (
        f"training on the first 10 of 40 rows of {path} (--train_samples); measuring on the first 5 of 40 rows of "
        f"{path} (--eval_samples); these are the rows that are trained on"
    )
    assert summary(train, None, None, 64) == f"training on all 40 rows of {path}; nothing is measured"


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val", "dev", "eval", "Test"])
def test_a_folder_with_train_and_test_is_recognised(tmp_path: Path, name: str) -> None:
    write(tmp_path / f"{name}.jsonl", [ROW] * 2)
    assert list(load_splits(str(tmp_path))) == ["test"]
    write(tmp_path / "train.jsonl", [ROW] * 3)
    assert {name: len(rows) for name, rows in load_splits(str(tmp_path)).items()} == {"train": 3, "test": 2}


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("train", "test", "val", "train_extra"):
        write(tmp_path / f"{name}.jsonl", [ROW] * 2)
    (tmp_path / "notes.md").touch()
    (tmp_path / "more").mkdir()
    splits = load_splits(str(tmp_path))
    assert splits["train"].unread == ("more/", "notes.md", "train_extra.jsonl", "val.jsonl")
    assert not_read(splits["test"]) == "; not read: more/, notes.md, train_extra.jsonl, val.jsonl"
    line = summary(splits["train"], None, splits["test"], None)
    assert line.endswith("; not read: more/, notes.md, train_extra.jsonl, val.jsonl")


def test_parts_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    for index in (1, 0, 2):
        write(tmp_path / "data" / f"train-{index:05}-of-00003.parquet", [{"instruction": f"{index}", "output": "x"}])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [ROW])
    splits = load_splits(str(tmp_path))
    assert splits["train"].rows["instruction"] == ["0", "1", "2"]
    assert len(splits["test"]) == 1
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"train has 3 parts, but part \[1\] is not there"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("other", ["train.csv", "TRAIN.jsonl", "train-00000-of-00001.jsonl"])
def test_two_files_of_one_split_are_refused(tmp_path: Path, other: str) -> None:
    for name in ("train.jsonl", other):
        write(tmp_path / name, [ROW])
    with pytest.raises(ValueError, match=r"several train files \(.*; keep one of them") as caught:
        load_splits(str(tmp_path))
    assert all(name in str(caught.value) for name in ("train.jsonl", other))


def test_a_folder_without_rows_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match=r"no train or test file.*notes\.md"):
        load_splits(str(tmp_path))
    path = write(tmp_path / "my_rows.jsonl", [ROW])
    with pytest.raises(ValueError, match="to read one file, name it: ") as caught:
        load_splits(str(tmp_path))
    assert str(caught.value).endswith(str(path))


# ---- datasets -------------------------------------------------------------------------------------------------------


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(numbered(30, number=7))
    dataset.save_to_disk(tmp_path / "[one]")
    assert {name: len(rows) for name, rows in load_splits(str(tmp_path / "[one]")).items()} == {"train": 27, "test": 3}
    assert len(load_test(str(tmp_path / "[one]"))) == 30
    datasets.DatasetDict(train=dataset, validation=dataset.select([3]), extra=dataset).save_to_disk(
        tmp_path / "several"
    )
    splits = load_splits(str(tmp_path / "several"))
    assert splits["train"].rows[29]["instruction"] == "Question 29"
    assert splits["test"].rows["instruction"] == ["Question 3"]
    assert splits["train"].unread == ("split extra",)


def test_a_damaged_or_unknown_dataset_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"question": "q", "reply": 1}]).save_to_disk(tmp_path / "unknown")
    with pytest.raises(ValueError, match=r"unknown/train: row 0 has none .*question, reply\); rename `question`"):
        load_splits(str(tmp_path / "unknown"))
    datasets.Dataset.from_list([{"instruction": "q", "response": "a"}]).save_to_disk(tmp_path / "response")
    with pytest.raises(
        ValueError, match=r"no text in output \(not there\).*instruction, response\); rename `response`"
    ):
        load_splits(str(tmp_path / "response"))
    datasets.DatasetDict(first=datasets.Dataset.from_list([ROW])).save_to_disk(tmp_path / "first")
    with pytest.raises(ValueError, match=r"no split named train or test, .*only \['first'\]"):
        load_splits(str(tmp_path / "first"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged: not readable as a folder of save_to_disk"):
        load_splits(str(tmp_path / "damaged"))


def test_rows_of_the_hub_take_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": f"a{index}"}] for index in range(20)]
    found = datasets.DatasetDict(train=datasets.Dataset.from_dict({"conversations": turns}))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: found)
    assert conversation(load_splits("someone/shared")["train"].rows[3])[1] == {"role": "assistant", "content": "a3"}
    with pytest.raises(ValueError, match=r"training rows only \(someone/shared/train\)"):
        load_test("someone/shared")
    assert len(load_measured("someone/shared", "held_out")) == 2
