# SPDX-License-Identifier: Apache-2.0
"""Transfers to and from state files: every byte arrives, or an error says which did not; nothing ends the process."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import logger
from helpers.disks import run_python
from helpers.state_rig import make_units

from grass_ds.config import GrassConfigError
from grass_ds.offload.block_io import AioIO, AioSettings, BlockIO, Piece, PosixIO, open_io
from grass_ds.offload.chunk_files import file_bytes, pieces_of
from grass_ds.offload.chunks import GRAIN, StateLayout
from grass_ds.offload.pinned_memory import HostMemory
from grass_ds.offload.state_files import ALIGNMENT, OffloadError, StateFile, StateFiles
from grass_ds.offload.state_format import choose_format

PAGES = 64
BLOCK = 4 * ALIGNMENT
LENGTHS = (1, 3, 4, 9, 16, 2)  # pages: less than a block, several blocks, with and without a remainder
NBYTES = PAGES * ALIGNMENT


@pytest.fixture(scope="module")
def aio_op() -> Any:
    try:
        return AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        pytest.skip(f"no AIO: {error}")


def settings(threads: int = 1) -> AioSettings:
    return AioSettings.parse({"block_size": BLOCK, "intra_op_parallelism": threads})


@pytest.fixture(params=["posix", "aio"])
def new_io(request: pytest.FixtureRequest) -> Iterator[Callable[..., BlockIO]]:
    """Makes objects of either kind, with any number of threads."""
    made: list[BlockIO] = []

    def new(threads: int = 1) -> BlockIO:
        aio = request.param == "aio"
        made.append(AioIO(request.getfixturevalue("aio_op"), settings(threads)) if aio else PosixIO(settings(threads)))
        return made[-1]

    yield new
    for io in made:
        io.close()
        io.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StateFile]:
    files = StateFiles(tmp_path, 0, "job", {"unit/0": NBYTES})
    yield files["unit/0"]
    files.close()


@pytest.fixture
def buffers() -> Iterator[list[torch.Tensor]]:
    """Two of them, with random contents."""
    memory = HostMemory(2 * NBYTES, pin=False, lock=True)
    memory.data.random_(0, 256)
    yield list(memory.data.chunk(2))
    memory.close()


def spread(buffer: torch.Tensor) -> list[Piece]:
    """Pieces of all ``LENGTHS``, in the file in reverse order and a page apart."""
    start, offset, pieces = 0, NBYTES, []
    for length in LENGTHS:
        nbytes = length * ALIGNMENT
        offset -= nbytes
        pieces.append(Piece(buffer.narrow(0, start, nbytes), offset))
        start, offset = start + nbytes, offset - ALIGNMENT
    return pieces


def contents(file: StateFile) -> torch.Tensor:
    return torch.frombuffer(bytearray(Path(f"/proc/self/fd/{file.fd}").read_bytes()), dtype=torch.uint8)


# ---- both kinds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_written_is_in_the_file_and_comes_back(
    new_io: Callable[..., BlockIO], file: StateFile, buffers: list[torch.Tensor], threads: int
) -> None:
    io, written, back = new_io(threads), spread(buffers[0]), spread(buffers[1])
    expected = torch.zeros(NBYTES, dtype=torch.uint8)
    for _ in range(2):  # AIO checks the first write of a range in another way than later ones
        buffers[0].random_(0, 256)
        io.write(file, written)
        for piece in written:
            expected[piece.offset :][: piece.tensor.nbytes] = piece.tensor
        assert torch.equal(contents(file), expected)
        io.read(file, back)
        for there, here in zip(written, back, strict=True):
            assert torch.equal(there.tensor, here.tensor)


def test_tensors_of_any_dtype(new_io: Callable[..., BlockIO], file: StateFile, buffers: list[torch.Tensor]) -> None:
    io, written, back = new_io(), buffers[0].view(torch.float32), buffers[1].view(torch.float32)
    torch.nn.init.normal_(written)
    io.write(file, [Piece(written, 0)])
    io.read(file, [Piece(back, 0)])
    assert torch.equal(written, back)


def test_two_threads_with_an_object_each(
    new_io: Callable[..., BlockIO], tmp_path: Path, buffers: list[torch.Tensor]
) -> None:
    """One writes while the other reads, over and over."""
    files = StateFiles(tmp_path, 0, "job", {"a": NBYTES, "b": NBYTES})
    reader, writer = new_io(), new_io()
    expected = buffers[1].clone()
    writer.write(files["b"], [Piece(buffers[1], 0)])
    wrong: list[int] = []

    def read() -> None:
        for turn in range(20):
            reader.read(files["b"], spread(buffers[1]))
            for piece in spread(buffers[1]):
                if not torch.equal(piece.tensor, expected[piece.offset :][: piece.tensor.nbytes]):
                    wrong.append(turn)

    thread = threading.Thread(target=read)
    thread.start()
    for turn in range(20):
        writer.write(files["a"], [Piece(buffers[0].fill_(turn), 0)])
    thread.join()
    assert wrong == []
    assert torch.equal(contents(files["a"]), buffers[0])
    files.close()


def test_a_deleted_file_is_still_there(
    new_io: Callable[..., BlockIO], file: StateFile, buffers: list[torch.Tensor]
) -> None:
    io = new_io()
    io.write(file, [Piece(buffers[0], 0)])
    file.path.unlink()
    io.read(file, [Piece(buffers[1], 0)])
    assert torch.equal(buffers[0], buffers[1])
    io.write(file, [Piece(buffers[0].fill_(7), 0)])
    assert (contents(file) == 7).all()
    assert not file.path.exists()


@pytest.mark.parametrize("name", ["fp32", "exact", "bf16", "8bit"])
def test_pieces_of_chunks_are_whole_pages_inside_the_file(name: str) -> None:
    """Nothing checks them later: AIO aborts the process when it reads beyond the end of a file."""
    planes = choose_format(name, ("exp_avg", "exp_avg_sq"), torch.bfloat16).planes
    layout = StateLayout({(0, torch.bfloat16): planes}, chunk_numel=2 * GRAIN)
    for unit in make_units(random.Random(0)):
        memory = HostMemory(layout.buffer_bytes, pin=False).data.split(layout.capacities)
        pages: list[int] = []
        for chunk in layout.chunks(unit):
            pieces = pieces_of(chunk, layout, memory)
            for piece, view in zip(pieces, layout.views(chunk, memory), strict=True):
                assert piece.tensor.data_ptr() % ALIGNMENT == piece.tensor.nbytes % ALIGNMENT == 0
                assert view.data_ptr() == piece.tensor.data_ptr() and view.nbytes <= piece.tensor.nbytes
                pages += range(piece.offset, piece.offset + piece.tensor.nbytes, ALIGNMENT)
        assert sorted(pages) == list(range(0, file_bytes(unit, layout), ALIGNMENT))  # no page belongs to two of them


@pytest.fixture(params=["posix", "aio"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "aio":
        request.getfixturevalue("aio_op")
    return request.param


def test_disks_that_stop_taking_data_and_files_that_somebody_truncated(kind: str, tmp_path: Path) -> None:
    """In a process of its own, which must not be aborted."""
    source = f"""
import os, resource, sys
from pathlib import Path
from grass_ds.offload.block_io import Piece, open_io
from grass_ds.offload.state_files import ALIGNMENT, OffloadError, StateFiles
from grass_ds.offload.pinned_memory import HostMemory

files = StateFiles(Path(sys.argv[2]), 0, "job", {{"unit": {NBYTES}}})
file, memory = files["unit"], HostMemory({NBYTES}, pin=False, lock=True)
whole = Piece(memory.data.fill_(1), 0)
pieces = [whole.part(0, ALIGNMENT), whole]
io = open_io(sys.argv[1], {{"block_size": {BLOCK}}}, direct=True, locked=memory.locked)()

def limit(nbytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))

def fails(transfer, *words):
    try:
        transfer(file, pieces)
    except OffloadError as error:
        assert all(word in str(error) for word in (*words, str(file.path))), error
    else:
        sys.exit(f"no error: {{words}}")

limit({NBYTES // 2})
if sys.argv[1] == "aio":  # which calls it a success
    io._handle.async_pwrite(whole.data, f"/proc/self/fd/{{file.fd}}", 0)
    assert io._handle.wait() == 1
fails(io.write, "write of", "File too large")
limit(resource.RLIM_INFINITY)
io.write(file, pieces)
whole.data.fill_(2)
limit({NBYTES // 2})
fails(io.write, "write of", "File too large")  # of a range that was written before, which AIO checks less
os.truncate(file.path, {NBYTES // 2})
fails(io.read, "has {NBYTES // 2} bytes instead of {NBYTES}")
fails(io.write, "has {NBYTES // 2} bytes instead of {NBYTES}")
limit(resource.RLIM_INFINITY)
os.truncate(file.path, {NBYTES})
for transfer in (io.read, io.write):
    transfer(file, pieces)
    transfer(file, [])
io.close()
print("closed")
"""
    assert "closed" in run_python(source, kind, tmp_path)


def test_files_that_are_closed(new_io: Callable[..., BlockIO], tmp_path: Path, buffers: list[torch.Tensor]) -> None:
    files, io = StateFiles(tmp_path, 0, "job", {"unit": NBYTES}), new_io()
    file = files["unit"]
    files.close()
    for transfer in (io.read, io.write):
        with pytest.raises(OSError, match="Bad file descriptor"):
            transfer(file, [Piece(buffers[0], 0)])


def test_the_kernel_may_transfer_less_than_asked(
    file: StateFile, buffers: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("preadv", "pwritev"):
        whole = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, to, at, whole=whole: whole(fd, [to[0][:ALIGNMENT]], at))
    io = PosixIO(settings())
    io.write(file, spread(buffers[0]))
    io.read(file, spread(buffers[1]))
    used = sum(LENGTHS) * ALIGNMENT
    assert torch.equal(buffers[0][:used], buffers[1][:used])
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    with pytest.raises(OffloadError, match=f"offset {2 * BLOCK} failed: the file ends after {2 * BLOCK} bytes"):
        io.read(file, [Piece(buffers[0][:ALIGNMENT], 2 * BLOCK)])
    io.close()


# ---- AIO that says nothing ------------------------------------------------------------------------------------------


class Handle:
    """A real ``aio_handle`` that transfers only what ``keep`` returns of each tensor; None refuses the request."""

    def __init__(self, handle: Any, keep: Callable[[torch.Tensor], torch.Tensor | None]):
        self._handle, self._keep = handle, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        return self._submit(self._handle.async_pread, tensor, path, offset)

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        return self._submit(self._handle.async_pwrite, tensor, path, offset)

    def _submit(self, submit: Callable[..., int], tensor: torch.Tensor, path: str, offset: int) -> int:
        kept = self._keep(tensor)
        return -1 if kept is None else submit(kept, path, offset + kept.data_ptr() - tensor.data_ptr())


def partial_aio(op: Any, keep: Callable[[torch.Tensor], torch.Tensor | None]) -> AioIO:
    return AioIO(SimpleNamespace(aio_handle=lambda *args: Handle(op.aio_handle(*args), keep)), settings())


@pytest.mark.parametrize(
    ("kept", "page"),
    [
        (slice(ALIGNMENT), 1),
        (slice(NBYTES - ALIGNMENT), PAGES - 1),
        (slice(8 * ALIGNMENT - 512), 7),  # within a page
        (slice(BLOCK, None), 0),
    ],
)
def test_a_read_that_is_not_whole_is_found(
    aio_op: Any, file: StateFile, buffers: list[torch.Tensor], kept: slice, page: int
) -> None:
    io = partial_aio(aio_op, lambda tensor: tensor[kept])
    message = (
        f"read of {ALIGNMENT} bytes at offset {page * ALIGNMENT} failed: AIO reported success, but delivered nothing"
    )
    with pytest.raises(OffloadError, match=message):
        io.read(file, [Piece(buffers[0], 0)])
    io.close()


@pytest.mark.parametrize(
    "kept", [slice(ALIGNMENT), slice(3 * BLOCK), slice(NBYTES - ALIGNMENT), slice(BLOCK, None)], ids=str
)
def test_a_first_write_that_is_not_whole_is_found(
    aio_op: Any, file: StateFile, buffers: list[torch.Tensor], kept: slice
) -> None:
    io = partial_aio(aio_op, lambda tensor: tensor[kept])
    with pytest.raises(OffloadError, match="AIO reported success, but the file has other contents"):
        io.write(file, [Piece(buffers[0], 0)])
    io.close()


def test_a_request_that_is_refused_does_not_leave_others_pending(
    aio_op: Any, file: StateFile, buffers: list[torch.Tensor]
) -> None:
    """If it did, closing the handle would abort this process."""
    io = partial_aio(aio_op, lambda tensor: None if tensor.nbytes == LENGTHS[2] * ALIGNMENT else tensor)
    for transfer in (io.read, io.write):
        with pytest.raises(OffloadError, match="could not open"):
            transfer(file, spread(buffers[0]))
    io.close()


def test_memory_that_aio_would_copy_is_refused(aio_op: Any, file: StateFile) -> None:
    memory = HostMemory(NBYTES, pin=False)
    io = AioIO(aio_op, settings())
    with pytest.raises(ValueError, match="page-locked"):
        io.write(file, [Piece(memory.data, 0)])
    io.close()


# ---- which kind -----------------------------------------------------------------------------------------------------


def test_auto_is_aio_where_it_can_be_had(aio_op: Any) -> None:
    for kind in ("auto", "aio"):
        io = open_io(kind, {}, direct=True, locked=True)()
        assert isinstance(io, AioIO)
        io.close()
    io = open_io("posix", {}, direct=True, locked=True)()
    assert isinstance(io, PosixIO)
    io.close()


@pytest.mark.parametrize(
    ("aio", "direct", "locked", "reason"),
    [
        ({}, False, True, "direct I/O"),
        ({}, True, False, "ulimit -l"),
        ({"queue_depth": 2**30}, True, True, "aio.queue_depth"),
    ],
)
def test_without_aio_the_reason_is_given(
    aio_op: Any,
    aio: dict[str, Any],
    direct: bool,
    locked: bool,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO", logger.name):
        io = open_io("auto", aio, direct, locked)()
    assert isinstance(io, PosixIO) and reason in caplog.text
    io.close()
    with pytest.raises(GrassConfigError, match=reason):
        open_io("aio", aio, direct, locked)


def test_without_a_compiler_aio_cannot_be_had(tmp_path: Path) -> None:
    source = """
import os, sys
os.environ.update(PATH="", CC="no-such-compiler", CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=sys.argv[1])
from grass_ds.offload.block_io import open_io
print(type(open_io("auto", {}, direct=True, locked=True)()).__name__)
try:
    open_io("aio", {}, direct=True, locked=True)
except ValueError as error:
    print(type(error).__name__, error)
"""
    lines = run_python(source, tmp_path)
    assert "PosixIO\n" in lines and "GrassConfigError" in lines and "install libaio-dev" in lines


@pytest.mark.parametrize(
    "block",
    [
        {"block_size": 1000},
        {"block_size": 0},
        {"block_size": 2**31},
        {"queue_depth": 0},
        {"queue_depth": "8"},
        {"intra_op_parallelism": True},
    ],
)
def test_values_that_aio_would_not_survive_are_refused(block: dict[str, Any]) -> None:
    (key,) = block
    with pytest.raises(GrassConfigError, match=rf"aio\.{key} = {block[key]!r}: it must be an integer from"):
        open_io("posix", block, direct=True, locked=True)


def test_keys_that_are_missing_or_null_have_deepspeeds_defaults() -> None:
    parsed = AioSettings.parse({"queue_depth": None, "intra_op_parallelism": 2})
    assert (parsed.block_size, parsed.queue_depth, parsed.intra_op_parallelism) == (2**20, 8, 2)
