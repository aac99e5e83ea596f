"""Metrics and penalties in Python: options objects and objects of the caller stand where names and mappings do."""

import attrs
import pytest
from luthier import LuthierError, Recipe
from luthier.recipe import load_recipe
from luthier.recipe.parts import named_parts, resolve_parts
from luthier.testing import expect_error
from luthier_metrics import ExactMatch, PassAtK
from luthier_objectives import L2


class Length:
    """A metric: the mean length of answers."""

    name = "length"
    greater_is_better = None

    def score_answer(self, prediction, reference):
        return float(len(prediction)), 1.0


class Nothing:
    """A penalty that adds nothing."""

    def measure(self, groups):
        return None


def made(**settings):
    return Recipe.from_dict({"model": "demo", "data": "rows.jsonl", **settings})


def test_an_options_object_is_what_its_name_and_options_are():
    objects = made(metrics=[ExactMatch(ignore_case=True), "bleu"], penalties=[L2(weight=0.5)])
    named = made(
        metrics=[{"name": "exact_match", "ignore_case": True}, "bleu"], penalties=[{"name": "l2", "weight": 0.5}]
    )
    for one, other in zip(resolve_parts(objects), resolve_parts(named), strict=True):
        assert (one.kind, one.name, one.options) == (other.kind, other.name, other.options)


def test_a_recipe_with_options_objects_is_written_and_read_again(tmp_path):
    recipe = made(metrics=[PassAtK(k=2), {"name": "rouge", "kind": "rouge2"}], penalties=[L2(weight=0.5)])
    recipe.write(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again.to_dict()["metrics"] == recipe.to_dict()["metrics"]
    assert [part.options for part in resolve_parts(again).metrics] == [
        part.options for part in resolve_parts(recipe).metrics
    ]
    given = attrs.evolve(recipe, metrics=[PassAtK(k=3)])  # as `luthier.evaluate` adds metrics
    assert given.to_dict()["metrics"] == [{"name": "pass_at_k", **attrs.asdict(PassAtK(k=3))}]


def test_an_object_of_the_caller_stays_itself_and_is_written_by_its_class():
    metric, penalty = Length(), Nothing()
    recipe = made(metrics=[metric], penalties=[penalty])
    assert (recipe.metrics, recipe.penalties) == ([metric], [penalty])
    assert load_recipe(recipe, {"seed": 3}).recipe.metrics == [metric]
    plain = recipe.to_dict()
    assert [plain["metrics"][0]["local"].rpartition(".")[2], plain["penalties"][0]["local"].rpartition(".")[2]] == [
        "Length",
        "Nothing",
    ]
    with expect_error("part-unknown", "metrics.0"):
        resolve_parts(made(metrics=plain["metrics"]))


@pytest.mark.parametrize(
    ("settings", "code", "place"),
    [
        ({"metrics": [L2()]}, "part-invalid", "metrics.0"),
        ({"penalties": ["l2", ExactMatch()]}, "part-invalid", "penalties.1"),
        ({"metrics": [ExactMatch]}, "part-invalid", "metrics.0"),
        ({"metrics": [3]}, "recipe-wrong-type", "metrics.0"),
        ({"metrics": [3], "max_eval_answers": 8}, "recipe-wrong-type", "metrics.0"),
        ({"metrics": 3}, "recipe-wrong-type", "metrics"),
    ],
)
def test_what_is_no_metric_or_penalty_is_refused_at_its_place(settings, code, place):
    with expect_error(code, place):
        made(**settings)


def test_a_penalty_may_stand_twice_only_with_other_options():
    with expect_error("recipe-conflict", "penalties.1"):
        resolve_parts(made(penalties=["l2", {"name": "l2"}]))
    both = resolve_parts(made(penalties=["kl", {"name": "kl", "divergence": "forward_kl"}])).penalties
    assert list(named_parts(both)) == ["kl", "kl-2"]


@pytest.mark.parametrize(
    ("lines", "code", "place"),
    [
        ("penalties:\n  - l2\n  - {name: kl, wieght: 3}\n", "recipe-unknown-option", ":5: penalties.1.wieght"),
        ("metrics:\n  - bleu\n  - name: pass_at_k\n    k: 0\n", "recipe-out-of-range", ":6: metrics.1.k"),
        ("penalties:\n  - kl\n  - nonesuch\n", "part-unknown", ":5: penalties.1"),
        ("penalties:\n  - kl\n  - kl\n", "recipe-conflict", ":5: penalties.1"),
    ],
)
def test_an_error_in_a_list_of_parts_names_the_line_of_its_file(lines, code, place, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: demo\ndata: rows.jsonl\n{lines}")
    with pytest.raises(LuthierError) as caught:
        Recipe.load(file)
    assert (caught.value.code, caught.value.where.rpartition("recipe.yaml")[2]) == (code, place)


def test_a_name_alone_where_parts_are_listed_gets_the_list_that_was_meant():
    with pytest.raises(LuthierError) as caught:
        made(penalties="kl")
    assert (caught.value.where, "[kl]" in caught.value.remedy) == ("penalties", True)
