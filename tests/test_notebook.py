"""In a notebook the progress bar and the plot show, in a real kernel."""

import json
import re

import pytest
from luthier.builtin.notebook import bar_markup, runs_in_notebook

CELL = """
import luthier
run = luthier.train(model="demo", data=DATA, adapter="lora", max_steps=3, learning_rate=1e-3, output_dir=FOLDER)
"""


def test_a_bar_tells_steps_numbers_and_the_time_left():
    text = bar_markup(4, 10, "loss 1.5 < 2", 8.0, 2)
    assert '<progress value="4" max="10">' in text
    assert "training 4/10 · loss 1.5 &lt; 2 · 0:00:08, 0:00:24 left" in text
    assert "<progress>" in bar_markup(4, None, "", 8.0, 2)
    assert not runs_in_notebook()


@pytest.mark.slow  # starts a kernel, which trains
def test_the_bar_and_the_plot_show_in_a_kernel(tmp_path):
    import nbclient
    import nbformat

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} and", "completion": f" {i + 1}"}) + "\n" for i in range(40)))
    source = CELL.replace("DATA", repr(str(rows))).replace("FOLDER", repr(str(tmp_path / "run")))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=170, kernel_name="python3").execute()
    shown = [output.data for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    bars = [data["text/html"] for data in shown if "text/html" in data]
    assert len(bars) == 1  # one bar, drawn again in its place
    assert re.search(r"training 3/3 · loss \d+\.\d{4} · [\d,]+ tok/s", bars[0])
    assert len([data for data in shown if "image/png" in data]) == 1
