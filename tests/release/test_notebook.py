# SPDX-License-Identifier: Apache-2.0
"""docs/quickstart.ipynb runs top to bottom, in one process without a launcher."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.all
@pytest.mark.dist
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[release]'")
    pytest.importorskip("ipykernel", reason="pip install '.[release]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install '.[release]'")
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # an error in a cell is an error here
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = "".join(output.get("text", "") for output in outputs)
    found = re.search(r"loss ([\d.]+) -> ([\d.]+); steps per layer: \(([\d, ]+)\)", shown)
    assert found is not None
    # Sixty training steps with two layers each. The loss before them is that of random weights, log(256) = 5.5.
    assert sum(map(int, found[3].split(","))) == 120
    assert float(found[2]) < float(found[1]) - 1
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_has_no_outputs_and_valid_code() -> None:
    """Outputs would be of some machine, and make every change of the notebook unreadable."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    for cell in cells:
        ast.parse("".join(cell["source"]))
