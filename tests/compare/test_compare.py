# SPDX-License-Identifier: Apache-2.0
"""`python -m grass_ds compare`: what it reads, its table and differences, its figure, and its page, also in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from grass_ds.__main__ import main
from grass_ds.compare import command, table
from grass_ds.compare.command import compare
from grass_ds.compare.curves import COLOURS, loss_figure
from grass_ds.compare.differences import differences
from grass_ds.compare.page import page
from grass_ds.compare.saved_run import SavedRun, load, load_all
from grass_ds.trainer.history import History, HistoryRow
from grass_ds.trainer.plots import INACTIVE, PROBING, TRAINED

HOSTILE = "<script>alert('x')</script>&\"$x_{"


def report(method: str = "lora", **more: Any) -> dict[str, Any]:
    """As launch/report.py writes it, as far as it is read."""
    return {
        "method": f"{method}, ZeRO-2",
        "model": "smollm2-135m",
        "ranks": 2,
        "precision": {"name": "bf16"},
        "before": {"exact": 0.0, "loss": 1.16},
        "after": {"exact": 0.219, "loss": 0.13},
        "seconds": {"training": 93.4},
        "speed": {"steps": 50, "tokens_per_second": 202.4},
        "memory": {"weights": {"device": 269_000_000, "host": 5}, "optimizer_state": {"device": 42_500_000}},
        "peak_memory": {"bytes": 1_720_000_000, "what": "resident"},
        "settings": {"method": method, "learning_rate": 2e-4, "lora_rank": 128, "output_dir": method, "flag": True},
        "ds_config": {"zero_optimization": {"stage": 2}},
        **more,
    }


def state(steps: int = 50, **last: float) -> dict[str, Any]:
    log = [{"step": step, "loss": 2.0 / step, "tokens_per_second": 100.0 * step} for step in range(10, steps + 1, 10)]
    return {"global_step": steps, "max_steps": steps, "log_history": [*log, {"step": steps, **last}]}


def write(folder: Path, history: bool = False, **files: dict[str, Any]) -> Path:
    """A folder with these JSON files, and the history of two layers: 2 steps of probing, then one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if history:
        layers = ("model.layers.0", "model.layers.1")
        rows = History.start(folder / "grass_history.jsonl", layers=layers, sampler="uniform", num_active_layers=1)
        for step in range(1, 51):
            probing = step <= 10
            active = (0, 1) if probing else (step // 10 % 2,)
            rows.append(HistoryRow(step, "probe" if probing else "train", active, (0.5, 0.5), None))
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora", report=report(), trainer_state=state())


@pytest.fixture
def lisa(tmp_path: Path) -> Path:
    block = {"sampler": "uniform", "num_active_layers": 1}
    config = {"zero_optimization": {"stage": 2}, "grass": block}
    settings = {"method": "lisa", "learning_rate": 1e-4, "lora_rank": None, "output_dir": "x", "flag": True}
    one = report("lisa", ds_config=config, settings=settings)
    return write(tmp_path / "lisa", history=True, report=one, trainer_state=state())


# ---- what is read --------------------------------------------------------------------------------------------------------


def test_a_folder_of_the_program_fills_the_table(lora: Path) -> None:
    cells = dict(zip(table.COLUMNS, table.rows([load(lora)])[0], strict=True))
    assert cells == {
        "run": "lora",
        "method": "lora",
        "ZeRO": "2",
        "model": "smollm2-135m",
        "steps": "50",
        "loss before": "1.160",
        "loss after": "0.130",
        "accuracy before": "0.0%",
        "accuracy after": "21.9%",
        "seconds": "93",
        "tokens/s": "202",
        "device bytes": "311.5 MB",
        "peak memory": "1.72 GB",
    }
    assert load(lora).losses == [(step, 2.0 / step) for step in (10, 20, 30, 40, 50)]


def test_a_folder_of_a_trainer_gives_what_it_has(tmp_path: Path) -> None:
    """The state is in checkpoints, of which the newest counts; the callback's history names the sampler."""
    folder = write(tmp_path / "own", history=True)
    write(folder / "checkpoint-9", trainer_state=state(10))
    last = {"eval_loss": 0.5, "train_runtime": 12.0, "grass/bytes/device": 7e6}
    write(folder / "checkpoint-50", trainer_state=state(50, **last))
    run = load(folder)
    assert (run.method, run.stage, run.model, run.steps) == ("uniform", None, None, 50)
    assert (run.loss_before, run.loss_after, run.seconds, run.device_bytes) == (None, 0.5, 12.0, 7e6)
    assert run.tokens_per_second == 3000.0
    assert len(run.losses) == 5
    cells = dict(zip(table.COLUMNS, table.rows([run])[0], strict=True))
    assert [name for name, cell in cells.items() if not cell] == [
        "ZeRO", "model", "loss before", "accuracy before", "accuracy after", "peak memory",
    ]  # fmt: skip


def test_a_history_alone_is_a_run(tmp_path: Path) -> None:
    run = load(write(tmp_path / "h", history=True))
    assert (run.method, run.steps, run.losses) == ("uniform", 50, [])


def test_values_of_other_kinds_are_left_empty(tmp_path: Path) -> None:
    odd = report(speed="fast", before=None, after={"loss": "low", "exact": True}, memory=[1], model=3)
    odd["method"] = None
    run = load(write(tmp_path / "odd", report=odd, trainer_state={"log_history": [1, {"loss": 1.0}, {"step": 2}]}))
    assert [run.steps, run.loss_after, run.accuracy_after, run.device_bytes, run.model, run.method] == [None] * 6
    assert run.losses == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", r"not the folder of a run: has no report\.json .*no trainer_state\.json .*no grass_history\.jsonl"),
        ("report.json", "{", r"report\.json: not valid JSON"),
        ("report.json", "[1]", r"report\.json: must hold a JSON object, not a list"),
        ("trainer_state.json", "\xff", r"trainer_state\.json: not valid JSON"),
        ("grass_history.jsonl", "{}\n", r"grass_history\.jsonl, line 1: not a grass history"),
    ],
)
def test_a_folder_without_a_run_is_named(tmp_path: Path, name: str | None, content: str, message: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    if name is not None:
        (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        load(folder)
    with pytest.raises(ValueError, match=f"{tmp_path / 'gone'}: no such folder"):
        load(tmp_path / "gone")


@pytest.mark.parametrize(("row", "message"), [((51, (2,)), "the model has 0 to 1"), ((50, (0,)), "after step 50")])
def test_a_history_that_contradicts_itself_is_named(tmp_path: Path, row: Any, message: str) -> None:
    folder = write(tmp_path / "h", history=True)
    with (folder / "grass_history.jsonl").open("a") as file:
        file.write(json.dumps({"step": row[0], "active_layers": row[1]}) + "\n")
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_runs_of_one_name_have_their_paths(tmp_path: Path) -> None:
    folders = [str(write(tmp_path / parent / "out", report=report())) for parent in ("a", "b")]
    assert [run.name for run in load_all(folders)] == folders


# ---- text ----------------------------------------------------------------------------------------------------------------


def test_settings_that_differ_are_listed(lora: Path, lisa: Path, tmp_path: Path) -> None:
    rows = differences([load(lora), load(lisa)])
    assert rows == [
        ["learning_rate", "0.0002", "0.0001"],
        ["lora_rank", "128", ""],
        ["config: grass.sampler", "", "uniform"],
        ["config: grass.num_active_layers", "", "1"],
    ]
    # A run without a report is not compared in what only a report has.
    own = write(tmp_path / "own", history=True)
    assert differences([load(lora), load(own)]) == []


def test_the_command_prints_one_table_and_the_differences(
    lora: Path, lisa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(lora), str(lisa)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "method", "ZeRO", "model"]
    assert [line.split()[0] for line in lines[1:3]] == ["lora", "lisa"]
    assert lines[0].index("steps") == lines[1].index("50")
    assert lines[4].split() == ["settings", "that", "differ", "lora", "lisa"]
    assert main(["compare", str(lora)]) == 0
    assert "differ" not in capsys.readouterr().out
    assert "no settings differ" in compare([str(lora), str(lora)])


def test_the_command_says_what_is_wrong(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write(tmp_path / "empty", report=report())
    for arguments, message in (
        ([str(tmp_path / "gone")], "gone: no such folder"),
        ([str(empty), "--plot", str(tmp_path / "loss.png")], "no loss curve to draw: empty"),
        ([str(lora), "--html", str(tmp_path / "no" / "page.html")], "no such folder; make it"),
        ([str(lora), "--plot", str(tmp_path / "loss.xyz")], "xyz"),
    ):
        assert main(["compare", *arguments]) == 1
        assert message in capsys.readouterr().err
    with (
        mock.patch.object(command, "find_spec", return_value=None),
        pytest.raises(ValueError, match=r"--html needs matplotlib, which is not installed: pip install matplotlib"),
    ):
        compare([str(lora)], html=str(tmp_path / "page.html"))


def test_the_terminal_gets_no_control_characters() -> None:
    assert table.as_text(["run"], [["\x1b[2Jä"]]) == "run\n\\x1b[2Jä"


def test_files_are_read_without_torch_or_transformers(lora: Path) -> None:
    code = (
        "import sys; from grass_ds.compare.command import compare; "
        f"compare([{str(lora)!r}]); "
        "assert not {'torch', 'transformers', 'deepspeed', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- figure and page -----------------------------------------------------------------------------------------------------


def test_the_figure_has_a_line_for_each_run() -> None:
    names = [HOSTILE, "_b", *(f"run {i}" for i in range(7))]
    runs = [SavedRun(name, losses=[(1.0, 2.0 + i), (2.0, float("nan"))]) for i, name in enumerate(names)]
    figure = loss_figure([*runs, SavedRun("none")])
    lines = figure.axes[0].lines
    assert [line.get_ydata()[0] for line in lines] == [2.0 + i for i in range(9)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == names
    figure.savefig(io.BytesIO(), format="png")


class Page(HTMLParser):
    """The elements of a page that are open, in order, and the texts of cells, of images and of the title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str | None]] = []
        self.headings: list[str] = []
        self._table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self._table = str(dict(attrs)["id"])
            self.cells[self._table] = []
        elif tag == "tr":
            self.cells[self._table].append([])
        elif tag in ("td", "th"):
            self.cells[self._table][-1].append("")
        elif tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[self._table][-1][-1] += data
        elif self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


def pixels(source: str | None) -> np.ndarray:
    return imread(io.BytesIO(base64.b64decode(str(source).partition("base64,")[2])), format="png")[..., :3]


def count(image: np.ndarray, colour: str) -> int:
    return int((np.abs(image - to_rgb(colour)).max(axis=-1) < 0.01).sum())


def test_the_page_has_table_curves_map_and_settings(lora: Path, lisa: Path, tmp_path: Path) -> None:
    main(["compare", str(lora), str(lisa), "--html", str(tmp_path / "page.html"), "--plot", str(tmp_path / "l.png")])
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    shown = Page((tmp_path / "page.html").read_text())
    assert shown.open == []
    runs = [load(lora), load(lisa)]
    assert shown.cells["results"] == [list(table.COLUMNS), *table.rows(runs)]
    assert shown.cells["settings"] == [["setting", "lora", "lisa"], *differences(runs)]
    assert shown.headings == [
        "Training loss", "Layers trained at each step", "lora", "lisa", "Settings that differ",
    ]  # fmt: skip
    loss, layers = shown.images
    assert (loss["class"], layers["class"], layers["alt"]) == ("loss", "layers", "Layers of lisa trained at each step")
    curves, drawn = pixels(loss["src"]), pixels(layers["src"])
    assert count(curves, COLOURS[1]) > 500  # the second curve lies on the first
    assert min(count(drawn, colour) for colour in (TRAINED, INACTIVE, PROBING)) > 20_000


def test_the_page_needs_nothing_else(lora: Path, lisa: Path) -> None:
    text = page([load(lora), load(lisa)])
    shown = Page(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(shown.tags)
    references = [value for name, value in shown.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert references
    assert all(str(value).startswith("data:image/png;base64,") for value in references)
    without_images = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|//|url\(|@import", without_images)
    assert "default-src 'none'" in text


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    odd = report(HOSTILE, model=HOSTILE, settings={HOSTILE: HOSTILE}, ds_config={HOSTILE: {HOSTILE: 1}})
    runs = [
        load(write(tmp_path / "a", report=odd, trainer_state=state())),
        load(write(tmp_path / "b", report=report())),
    ]
    history = History.start(tmp_path / "h.jsonl", layers=(HOSTILE,), sampler=HOSTILE, num_active_layers=1)
    history.append(HistoryRow(1, "train", (0,), (1.0,), None))
    runs[0].history, runs[0].name = history, HOSTILE
    text = page(runs)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    shown = Page(text)
    assert shown.open == []
    assert [row[0] for row in shown.cells["results"][1:]] == [HOSTILE, "b"]
    assert [HOSTILE, HOSTILE, ""] in shown.cells["settings"]
    assert f"Layers of {HOSTILE} trained at each step" in [image["alt"] for image in shown.images]


def test_a_page_without_losses_and_histories_says_so(tmp_path: Path) -> None:
    text = page([load(write(tmp_path / "a", report=report()))])
    assert "No losses were saved of: a" in text
    assert "No history" in text
    assert Page(text).images == []


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell", "firefox")


def browser(picture: Path = Path()) -> list[str] | None:
    """A command that draws a page into the file ``picture``; None: no browser is installed."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        return None
    if "firefox" in Path(found).name:
        return [found, "--headless", "--window-size=1280,2200", "--screenshot", str(picture)]
    options = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,2200"]
    return [found, "--headless", *options, f"--screenshot={picture}"]


@pytest.mark.skipif(browser() is None, reason=f"no browser is installed: looked for {', '.join(BROWSERS)}")
def test_a_browser_shows_table_curves_and_map(lora: Path, lisa: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    compare([str(lora), str(lisa)], html=str(file))
    started = [*(browser(picture) or ()), file.as_uri()]
    subprocess.run(
        started, check=True, timeout=120, capture_output=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    )
    image = imread(picture)[..., :3]
    # From above: the table (dark letters on white, before the first coloured point), the curves, the map.
    curve, layers = (np.abs(image - to_rgb(colour)).max(axis=-1) < 0.02 for colour in (COLOURS[1], PROBING))
    first_curve, first_map = int(curve.any(axis=1).argmax()), int(layers.any(axis=1).argmax())
    assert 100 < first_curve < first_map
    assert (image[60:first_curve] < 0.4).all(axis=-1).sum() > 1_000
    assert curve.sum() > 300
    assert layers.sum() > 5_000
