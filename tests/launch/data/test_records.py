import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.data.records import Record, read

ROWS = [{"instruction": f"q{index}", "output": f"a{index}"} for index in range(3)]


def records(folder: Path, name: str, text: str) -> list[Record]:
    (folder / name).write_bytes(text.encode())
    return list(read(folder / name))


def values(folder: Path, name: str, text: str) -> list[dict[str, Any]]:
    return [dict(record.values) for record in records(folder, name, text)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- json -----------------------------------------------------------------------------------------------------------


WRAPPED = {"version": "1", "data": ROWS}
COLUMNS = {"instruction": ["q0", "q1", "q2"], "output": ["a0", "a1", "a2"]}


def test_rows_may_be_lines_a_list_wrapped_or_columns(tmp_path: Path) -> None:
    texts = [lines(ROWS), "\n" + lines(ROWS).replace("\n", "\r\n\r\n"), lines(ROWS).rstrip(), json.dumps(ROWS)]
    texts += [json.dumps(whole, indent=1) for whole in (ROWS, WRAPPED, COLUMNS)]
    for text in texts:
        assert values(tmp_path, "a.json", text) == values(tmp_path, "a.jsonl", text) == ROWS
    for whole in (WRAPPED, COLUMNS):  # in a single line, which in .jsonl would be one row
        assert values(tmp_path, "a.json", json.dumps(whole)) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL"])
@pytest.mark.parametrize(
    "row",
    [
        ROWS[0],
        {"text": ["a"]},
        {"messages": []},
        {"messages": {"role": "user"}},
        {"conversation": [{"from": "human", "value": "q"}]},
        {"data": [{"text": "t"}]},
    ],
)
def test_the_only_line_of_a_json_lines_file_is_a_row(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    """As it would be with a second line behind it."""
    assert records(tmp_path, name, "\n" + json.dumps(row)) == [Record(row, 2)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "row",
    [
        {**ROWS[0], "meta": {"a": 1}, "history": [{"b": 2}]},
        {"messages": [{"role": "user", "content": "q"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
)
def test_a_single_object_is_one_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    assert json.loads(json.dumps(values(tmp_path, "a.json", json.dumps(row, indent=indent)))) == [
        json.loads(json.dumps(row), parse_int=str)
    ]


def test_records_know_their_line(tmp_path: Path) -> None:
    text = "\n" + lines(ROWS[:1]) + "\n" + lines(ROWS)
    assert [record.line for record in records(tmp_path, "a.jsonl", text)] == [2, 4, 5, 6]
    assert [record.line for record in records(tmp_path, "a.json", json.dumps(ROWS))] == [None] * 3


@pytest.mark.parametrize("number", ["0", "-0", "1.50", "1e5", "12345678901234567890", "1" + "0" * 5000, "0.1000"])
def test_a_number_is_the_text_that_the_file_holds(tmp_path: Path, number: str) -> None:
    assert values(tmp_path, "a.jsonl", f'{{"answer": {number}}}\n{{"answer": 1}}\n')[0] == {"answer": number}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", lines(ROWS) + '{"instruction": "q", "outp\n' + lines(ROWS), "line 4: Unterminated string"),
        ("a.jsonl", '{"instruction": "q", "outp\n' + lines(ROWS), "line 1: Unterminated string"),
        ("a.jsonl", '{"instruction": ', "line 1: it ends in the middle"),
        ("a.ndjson", '{"a": 1},\n' + lines(ROWS), "line 1: a comma that nothing follows; remove it"),
        ("a.jsonl", lines(ROWS[:1]) + '{"a": 1},\n', "line 2: a comma that nothing follows; remove it"),
        ("a.jsonl", '{"a": 1},\n' + lines(ROWS), "line 1: a comma that nothing follows; remove it"),
        ("a.jsonl", '{"a": 1,}\n' + lines(ROWS), "line 1: a comma that nothing follows; remove it"),
        ("a.json", '[\n {"a": 1},\n {"a": 2},\n]', "line [34]: a comma that nothing follows; remove it"),
        ("a.json", '\n\n[\n {"a": 1}\n {"a": 2}\n]', "line 5: Expecting ',' delimiter in column 2"),
        ("a.json", '{\n"a": 1\n}\n{\n"a": 2\n}\n', "line 4: Extra data in column 1; write one object a line, or"),
        ("a.json", "hello", "line 1: Expecting value in column 1"),
        ("a.jsonl", '{"a": 1, "a": 2}\n' + lines(ROWS), "line 1: an object names 'a' twice"),
        ("a.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_json_is_named_with_its_line(tmp_path: Path, name: str, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: not readable as json: {expected}"):
        records(tmp_path, name, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", "row 0 is a number, not an object: write one object a row; with pandas"),
        ('"text"', "the file holds a text, not rows"),
        (lines([[1], [2]]), "line 1 holds a list|not readable as json: line 2"),
        (lines([*ROWS, ["q", "a"]]), "line 4 holds a list, not an object"),
        (
            json.dumps({"train": ROWS, "test": ROWS}),
            "the file holds several lists .train, test.; write each to a file",
        ),
        (json.dumps({"instruction": {"0": "q"}, "output": {"0": "a"}}), "columns with an index .*orient='records'"),
        (json.dumps({"columns": ["instruction"], "index": [0], "data": [["q"]]}), "columns with an index"),
        (json.dumps({"instruction": ["q", "r"], "output": ["a"]}), "the columns differ in length: .*'output': 1"),
    ],
)
def test_json_without_rows_is_refused_with_the_remedy(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.json: .*({expected})"):
        records(tmp_path, "a.json", text)


# ---- csv ------------------------------------------------------------------------------------------------------------


def test_a_csv_value_is_the_text_that_the_file_holds(tmp_path: Path) -> None:
    texts = ["02134", "12345678901234567", "2024-01-05", "0", "None", "NA", "nan", "true", "1e5", " a ", "x" * 200_000]
    read = values(tmp_path, "a.csv", "instruction,input,output\n" + "".join(f"q,{text},a\n" for text in texts))
    assert [row["input"] for row in read] == texts


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", "\t"), ("a.tsv", ","), ("a.CSV", ";"), ("a.csv", ",")])
def test_the_header_tells_the_delimiter(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [["instruction", "output"], ["q: a.b", "a"], ['"x,y;z\tw"', '"say ""b"""']]
    read = values(tmp_path, name, "\n".join(delimiter.join(row) for row in rows))
    assert read == [{"instruction": "q: a.b", "output": "a"}, {"instruction": "x,y;z\tw", "output": 'say "b"'}]


def test_csv_with_a_mark_crlf_and_line_breaks_in_quotes(tmp_path: Path) -> None:
    text = '\ufeffinstruction, output\r\n"q\r\nx","a, ""b"""\r\n\r\nr,c\r\n'
    read = records(tmp_path, "a.csv", text)
    rows = [{"instruction": "q\r\nx", "output": 'a, "b"'}, {"instruction": "r", "output": "c"}]
    assert read == [Record(rows[0], 2, read[0].hint), Record(rows[1], 5, read[0].hint)]


def test_a_single_column_needs_no_delimiter(tmp_path: Path) -> None:
    assert values(tmp_path, "a.csv", 'text\nhello\n"a, b; c"\n') == [{"text": "hello"}, {"text": "a, b; c"}]


def test_empty_fields_at_the_end_and_an_index_without_a_name_are_harmless(tmp_path: Path) -> None:
    assert values(tmp_path, "a.csv", "instruction,output\nq,a,\n") == [{"instruction": "q", "output": "a"}]
    assert values(tmp_path, "a.csv", ",instruction,output\n0,q,a\n") == [{"instruction": "q", "output": "a"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("instruction,output,output\nq,a,b\n", "the header names output twice; rename or remove"),
        ("instruction,output\nq,a\nq,a, b\n", r"row 1 \(line 3\) has 3 columns where the header names 2 .*double"),
        ("instruction,output,answer\nq,a b\nc,5\n", r"row 0 \(line 2\) has 2 columns where the header names 3"),
        ('instruction,output\nq,a\nq,"a\nq2,a2\n', "the row that begins in line 3: .*must end with a double quote"),
        ('instruction,output\nq,"a" b\n', "the row that begins in line 2: .*double quote within it is written twice"),
        ('"instruction,output\nq,a\n', "the row that begins in line 1: "),
    ],
)
def test_broken_csv_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.csv: .*{expected}"):
        records(tmp_path, "a.csv", text)


# ---- parquet --------------------------------------------------------------------------------------------------------


def test_parquet_gives_values_without_the_nulls_of_other_rows(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q", "call": {"x": 1}}], "answer": 10**12},
        {"messages": [{"role": "user", "content": "q", "call": {"y": None, "z": [None]}}], "answer": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [record.values for record in read(tmp_path / "a.parquet")] == [
        rows[0],
        {"messages": [{"role": "user", "content": "q", "call": {"z": [None]}}], "answer": None},
    ]


def test_columns_that_are_not_needed_are_not_read_but_known(tmp_path: Path) -> None:
    far = pa.array([2**62], pa.timestamp("ms"))  # no date of Python's
    pq.write_table(pa.table({"output": ["a"], "when": far}), tmp_path / "a.parquet")
    assert [record.values["output"] for record in read(tmp_path / "a.parquet", used=["output"])] == ["a"]
    assert [set(record.values) for record in read(tmp_path / "a.parquet", used=["text"])] == [{"output", "when"}]
    with pytest.raises(ValueError, match=r"a\.parquet: not readable as parquet"):
        list(read(tmp_path / "a.parquet"))


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet: not readable as parquet: "):
        records(tmp_path, "a.parquet", "hello")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["output", "output"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: the file has two columns named output"):
        list(read(tmp_path / "a.parquet"))
