import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from launch.data.text_files import format_of, open_text

TEXT = "instruction,output\ncafé,😀\n"


def read(path: Path, encoding: str = "utf-8") -> str:
    with open_text(path, encoding) as text:
        return text.read()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.json", "json"),
        ("a.JSONL", "json"),
        ("a.b.ndjson.gz", "json"),
        ("a.csv.ZST", "csv"),
        ("a.Tsv", "csv"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.txt", None),
        ("jsonl", None),
        (".jsonl", None),
    ],
)
def test_the_ending_tells_the_format(name: str, kind: str | None) -> None:
    assert format_of(Path(name)) == kind


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides_whatever_was_asked_for(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes(TEXT.encode(encoding))
    assert read(tmp_path / "a.csv") == TEXT
    if encoding != "utf-8":
        assert read(tmp_path / "a.csv", "latin-1") == TEXT


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "utf-16-be", "shift_jis"])
def test_other_encodings_are_read_when_they_are_named(tmp_path: Path, encoding: str) -> None:
    text = "café" if encoding != "shift_jis" else "日本"
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    assert read(tmp_path / "a.csv", encoding) == text
    with pytest.raises(ValueError, match=r"a\.csv: not text in utf-8.*--encoding"):
        read(tmp_path / "a.csv")


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"q,a\n" * 50_000 + "caf\xe9,a\n".encode("latin-1"))
    told = r"not text in utf-8 \(line 50001, byte 0xe9 after 3 others\).*latin-1, cp1252"
    with pytest.raises(ValueError, match=told):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("content", "encoding", "remedy"),
    [
        (b"caf\xe9", "utf-8", "for example latin-1, cp1252 or utf-16"),
        (b"caf\x81", "cp1252", "for example latin-1, utf-16 or utf-8"),
        (b"caf\x81", "Windows-1252", "for example latin-1, utf-16 or utf-8"),
        (b"q,a", "utf-16", "for example utf-16-le or utf-16-be"),
        ("q,a".encode("utf-16-be"), "utf-16", "for example utf-16-le or utf-16-be"),
        (b"\xff\xfeq", "utf-16-be", "its byte order mark says this encoding: write the file again"),
    ],
)
def test_the_encoding_that_did_not_fit_is_not_proposed(
    tmp_path: Path, content: bytes, encoding: str, remedy: str
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv: not text in .*{remedy}$"):
        read(tmp_path / "a.csv", encoding)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compression_is_seen_in_the_bytes_and_a_cut_archive_is_refused(tmp_path: Path, compression: str) -> None:
    text = "".join(f"{index} {index**3}\n" for index in range(10_000))
    for path in (tmp_path / name for name in ("a.jsonl.gz", "a.jsonl.zst", "a.jsonl")):
        with pa.output_stream(str(path), compression=compression) as stream:
            stream.write(text.encode())
        assert read(path) == text
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match=rf"{path}: the compressed file is broken or cut off: .*copy or pack"):
            read(path)
        path.write_text(TEXT)
        assert read(path) == TEXT  # packed in name only


def test_archives_in_several_parts_are_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a\n") + gzip.compress(b"b\n"))
    assert read(tmp_path / "a.gz") == "a\nb\n"
    zstd = pa.Codec("zstd")
    (tmp_path / "a.zst").write_bytes(b"".join(zstd.compress(text, asbytes=True) for text in (b"a\n", b"b\n")))
    assert read(tmp_path / "a.zst") == "a\nb\n"
