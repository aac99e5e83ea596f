"""`luthier inspect`: examples with their supervised tokens, drops, lengths."""

import functools
import json

import pytest
from luthier import Recipe
from luthier.cli.inspect import draw_inspection
from luthier.testing import expect_error
from rich.console import Console


def test_inspect_in_a_process_of_its_own_prints_one_document(command, tiny):
    result = command("inspect", tiny / "r.yaml", "--rows", "2", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["examples"]) == 2
    supervised = [text for text, counted in found["examples"][0]["pieces"] if counted]
    assert supervised == ["It is 0.</s>"]
    assert 0 < found["supervised_share"] < 1


def test_without_colour_the_supervised_tokens_stand_between_marks(luthier, tiny):
    text = luthier("inspect", tiny / "r.yaml", "--rows", "1").stdout
    assert "How much is 0 and 0?«It is 0.</s>»" in text
    assert "Example 2" not in text


def test_with_colour_the_supervised_tokens_are_green(tiny, monkeypatch):
    from luthier import api

    monkeypatch.delenv("NO_COLOR", raising=False)
    found = api.inspect(Recipe.load(tiny / "r.yaml"), rows=1)
    screen = Console(width=100, force_terminal=True, color_system="standard", highlight=False, markup=False)
    with screen.capture() as captured:
        draw_inspection(screen, found)
    assert "\x1b[32mIt is 0.</s>\x1b[0m" in captured.get()
    assert "«" not in captured.get()


def test_inspect_says_share_drops_by_reason_and_lengths_with_a_histogram(luthier, tiny):
    result = luthier("inspect", tiny / "r.yaml", "--data.max-length", "32", "--data.overlong", "drop")
    assert result.status == 0, result.stderr
    dropped = next(line for line in result.stdout.splitlines() if line.strip().startswith("dropped"))
    assert "overlong" in dropped
    for text in ("% of them supervised", "median", "longest", "█", "Training rows", "Validation rows"):
        assert text in result.stdout


def test_the_histogram_counts_every_example(luthier, tiny):
    found = luthier("inspect", tiny / "r.yaml", "--json").document["report"]
    assert sum(count for *_, count in found["histogram"]) == found["examples"]


def test_no_example_is_shown_where_none_is_asked_for(luthier, tiny):
    assert "Example 1" not in luthier("inspect", tiny / "r.yaml", "--rows", "0").stdout


PAIRS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea.", "margin": i} for i in range(6)]


def test_a_pair_is_shown_with_both_sides_coloured_its_lengths_and_what_sharing_saves(
    luthier, tiny, tmp_path, monkeypatch
):
    from luthier import api

    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    text = luthier("inspect", tiny / "r.yaml", "--data", tmp_path / "pairs.jsonl", "--rows", "1").stdout
    for part in ("chosen", "rejected", "«It is 0.", "«No idea.", "lengths of chosen", "saved by sharing the prompt"):
        assert part in text
    monkeypatch.delenv("NO_COLOR", raising=False)
    found = api.inspect(tiny / "r.yaml", data=str(tmp_path / "pairs.jsonl"), rows=1)
    screen = Console(width=100, force_terminal=True, color_system="standard", highlight=False, markup=False)
    with screen.capture() as captured:
        draw_inspection(screen, found)
    assert "\x1b[32mIt is 0." in captured.get() and "\x1b[31mNo idea." in captured.get()
    saved = found.report.shared_tokens
    assert saved >= sum(len(row["prompt"]) for row in PAIRS) and f"save {saved:,} tokens" in captured.get()


def test_pairs_are_shown_with_a_warning_where_the_loss_takes_none(luthier, tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    shown = luthier("inspect", tiny / "r.yaml", "--data", tmp_path / "pairs.jsonl", "--data.validation", "0.5")
    assert "[warning" in shown.stderr and "--loss dpo" in shown.stderr


@pytest.mark.parametrize("loss", ["sft", "{name: sft, label_smoothing: 0.1}"])
def test_a_loss_that_is_named_is_inspected_with_its_own_rows_only(loss, luthier, tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    refused = luthier("inspect", tiny / "r.yaml", "--data", tmp_path / "pairs.jsonl", "--loss", loss, "--json")
    assert refused.document["error"]["code"] == "data-format"


def test_a_recipe_in_python_that_leaves_the_loss_out_may_have_any_rows(tiny):
    from luthier import api

    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    recipe = Recipe.load(tiny / "r.yaml")
    assert len(api.inspect(recipe, data=rows).examples[0].documents) == 2
    for named in (api.inspect, functools.partial(api.inspect, recipe)):
        with expect_error("data-format", "data"):
            named(model=str(tiny / "llama"), data=rows, loss="sft")
