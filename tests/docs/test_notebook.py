"""Training in a notebook shows a live line instead of the lines of a log."""

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook")
nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
pytest.importorskip("ipywidgets", reason="needs the extra notebook")

TRAIN = """
from arraytp.training.progress import Progress
with Progress("fa", epochs=1, steps_per_epoch=2) as progress:
    progress.step(128, steps=2, loss=2.3, top1=10.0)
    progress.epoch({"epoch": 1, "train_loss": 2.2, "train_top1": 15.0, "test_loss": 2.0, "test_top1": 22.0})
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_notebook_gets_a_live_line():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAIN)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [
        output for output in notebook.cells[0].outputs if "application/vnd.jupyter.widget-view+json" in output.data
    ]
    assert len(shown) == 1
    models = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    (line,) = [model["state"]["outputs"] for model in models if model["model_name"] == "OutputModel"]
    assert "epoch 1/1" in str(line)
    assert "test 22.0 %" in str(line)
