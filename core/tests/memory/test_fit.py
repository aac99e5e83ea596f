"""What does not fit is said before the first step: positions, tokens, micro-batches; and rows to evaluate later."""

import json

import pytest
from luthier.errors import LuthierError
from luthier.testing.worlds import save_tiny_model

LONG = [{"prompt": "q" * 40, "completion": str(i)} for i in range(8)]


def test_examples_longer_than_a_table_of_positions_are_refused_before_a_folder_appears(train, tmp_path):
    model = save_tiny_model(tmp_path / "model", "gpt2", n_positions=32)
    with pytest.raises(LuthierError, match="32 positions") as caught:
        train(model=str(model), data=LONG)
    assert caught.value.where == "data.max_length"
    assert not (tmp_path / "run").exists()
    assert train(model=str(model), data={"max_length": 32, "train": _file(tmp_path, LONG), "overlong": "truncate",
                                         "train_on": "all"}).steps == 1  # fmt: skip


def test_rotary_positions_beyond_the_known_ones_train_with_a_warning(train, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=32)
    assert train(model=str(model), data=LONG).steps == 1
    assert "longer than the model's positions" in capsys.readouterr().err


def test_what_both_sets_of_rows_have_to_say_is_logged_once(train, capsys):
    rows = [{"prompt": f"{i}?", "completion": "yes", "colour": "red"} for i in range(8)]
    train(data=rows, eval_data=rows[:2])
    assert capsys.readouterr().err.count("colour") == 1


def test_a_file_to_evaluate_has_the_columns_of_the_run(train, tmp_path):
    rows = [{"q": f"{i}?", "a": str(i)} for i in range(8)]
    columns = {"prompt": "q", "completion": "a"}
    path = _file(tmp_path, rows)
    run = train(data={"train": [{"path": path, "columns": columns}], "validation": 0.25})
    assert run.evaluate(path) == run.evaluate(rows) == run.evaluate({"path": path, "columns": columns})


def test_rows_to_evaluate_that_do_not_fit_are_errors(train, rows):
    run = train(data=[{"prompt": "q", "completion": str(i)} for i in range(8)], max_tokens_per_device=32)
    with pytest.raises(LuthierError) as caught:
        run.evaluate(LONG)
    assert caught.value.where == "max_tokens_per_device"
    with pytest.raises(LuthierError) as caught:
        run.evaluate([{"input_ids": [1, 2, 99_999]}])
    assert caught.value.code == "model-vocabulary"


def _file(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
