"""Every pair of an adapter, a quantizer, a loss and an optimizer trains, goes on after a cut and merges, or has its reason.

A covering array: as few whole recipes as hold every pair of parts that go together. All of them run in the slow suite, a
sample in the default one. The methods of PEFT stand for each other here, as do the parts of bitsandbytes and of torchao;
`test_peft_training.py` and that plugin's own tests train each.
"""

import itertools
import json
import math
import random
import re

import attrs
import luthier
import pytest
from luthier import LuthierError, Recipe
from luthier.plugins.registry import Plugins
from luthier.recipe.checks.soundness import check_parts
from luthier.recipe.parts import resolve_parts
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model

KINDS = ("adapter", "quantizer", "loss", "optimizer")
USUAL = {"adapter": "lora", "quantizer": "none", "loss": "sft", "optimizer": "adamw"}
OPTIONS = {
    "adalora": {"init_r": 6, "target_r": 4},
    "apollo": {"rank": 4},
    "evolution": {"pairs": 1},
    "infonce": {"temperature": 0.1},
}
ROWS = {"preference": "pairs", "unpaired": "judged", "documents": "texts"}
STAND = (
    "peft.lora",
    "bnb.nf4",
    "bnb.adamw_8bit",
    "torchao.int4",
    "torchao.float8",
    "torchao.adamw_4bit",
)  # for the others of their families
SAMPLE = 60  # pairs of the default suite, whose time is short


def offered():
    """Kind -> record by name, of what is installed."""
    plugins = Plugins(blocked=[])
    found = {kind: {o.record.name: o.record for o in plugins.offers(kind)} for kind in KINDS}
    return {kind: {n: r for n, r in parts.items() if n in STAND or "." not in n} for kind, parts in found.items()}


OFFERED = offered()


def settings_of(combination, folder="."):
    """The recipe of four parts, by kind."""
    loss = OFFERED["loss"][combination["loss"]]
    rows = ROWS.get(loss.data, "rows")
    given = {kind: {"name": name, **OPTIONS.get(name, {})} for kind, name in combination.items()}
    given |= {"model": f"{folder}/model", "data": f"{folder}/{rows}.jsonl"}
    if "teacher" in loss.needs:
        given["teacher"] = f"{folder}/teacher"
    return given


def refusal(combination):
    """Why these parts do not go together by what they declare; None where they do."""
    try:
        recipe = Recipe.from_dict(settings_of(combination))
        check_parts(recipe, resolve_parts(recipe), "cpu")
    except LuthierError as error:
        return error
    return None


def pairs_of(combination):
    return set(itertools.combinations(sorted(combination.items()), 2))


def every_pair():
    for one, other in itertools.combinations(KINDS, 2):
        for first, second in itertools.product(OFFERED[one], OFFERED[other]):
            yield {**USUAL, one: first, other: second}, frozenset(((one, first), (other, second)))


REFUSED = {pair: error for combination, pair in every_pair() if (error := refusal(combination)) is not None}


def covering():
    """Recipes that hold every pair that is not refused, few of them: each takes the most new pairs of some drawn."""
    left = {tuple(sorted(pair)) for _, pair in every_pair()} - {tuple(sorted(pair)) for pair in REFUSED}
    chance, found = random.Random(0), []
    while left:
        first, second = min(left)
        best, most = None, -1
        others = [{kind: chance.choice(sorted(OFFERED[kind])) for kind in KINDS} for _ in range(60)]
        for other in (USUAL, *others):  # the pair goes together among the usual parts at least
            drawn = {**other, **dict((first, second))}
            new = len(pairs_of(drawn) & left)
            if new > most and not any(frozenset(pair) in REFUSED for pair in pairs_of(drawn)):
                best, most = drawn, new
        assert best is not None, f"no recipe holds {first} and {second}"
        found.append(best)
        left -= pairs_of(best)
    return found


def sampled(array):
    """The numbers of recipes drawn from a seed until they hold `SAMPLE` pairs."""
    numbers, held = [], set()
    for number in random.Random(1).sample(range(len(array)), len(array)):
        if len(held) >= SAMPLE:
            break
        numbers.append(number)
        held |= pairs_of(array[number])
    return numbers


ARRAY = covering()
SAMPLED = sampled(ARRAY)
CASES = [
    pytest.param(combination, id="-".join(combination[kind] for kind in KINDS),
                 marks=() if number in SAMPLED else pytest.mark.slow)
    for number, combination in enumerate(ARRAY)
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model that has biases, its teacher, and rows of each kind."""
    folder = tmp_path_factory.mktemp("pairs")
    save_tiny_model(folder / "model", "qwen2")
    save_tiny_model(folder / "teacher", "qwen2", seed=5)
    numbers = range(8)
    written = {
        "rows": [{"prompt": f"{i}?", "completion": "yes", "forget": bool(i % 2)} for i in numbers],
        "pairs": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "margin": 0.5} for i in numbers],
        "judged": [{"prompt": f"{i}?", "completion": "yes", "label": bool(i % 2)} for i in numbers],
        "texts": [{"query": f"{i}?", "passage": f"{i}.", "negative": f"not {i}"} for i in numbers],
    }
    for name, rows in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cut_after_one(step):
    if step == 2:
        raise RuntimeError("power cut")


@pytest.mark.parametrize("combination", CASES)
def test_parts_that_go_together_train_go_on_after_a_cut_and_merge(world, tmp_path, combination):
    shared = {
        **settings_of(combination, world), "max_steps": 2, "save_steps": 1, "global_batch_size": 4,
        "learning_rate": 1e-3, "output_dir": tmp_path / "run",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="power cut"):
        luthier.train(**shared, callbacks=["jsonl", luthier.on(step_ended=cut_after_one)])
    run = luthier.train(**shared, callbacks=["jsonl"])
    assert run.steps == 2 and all(math.isfinite(loss) for loss in run.loss_history)
    parts = [OFFERED[kind][combination[kind]] for kind in ("adapter", "quantizer")]
    if all(part.mergeable for part in parts):
        assert (run.merge(tmp_path / "merged") / "config.json").is_file()
        return
    with pytest.raises(LuthierError) as caught:
        luthier.merge(tmp_path / "run", tmp_path / "merged")
    assert caught.value.code == "artifact-unmergeable"


def test_the_array_holds_every_pair_that_is_not_refused():
    held = set().union(*(pairs_of(combination) for combination in ARRAY))
    every = {tuple(sorted(pair)) for _, pair in every_pair()}
    assert held == every - {tuple(sorted(pair)) for pair in REFUSED}
    assert {name for pair in held for _, name in pair} == {name for kind in KINDS for name in OFFERED[kind]}


def test_every_refused_pair_has_its_reason():
    for pair, error in REFUSED.items():
        assert error.code == "part-incompatible", f"{sorted(pair)}: {error}"
        named = [name for _, name in pair if f"'{name}'" in str(error)]
        assert named, f"{sorted(pair)}: {error}"
        assert re.search(r"needs [\w:-]+, which|does not work with [\w:-]+, which", str(error)), str(error)
    assert {frozenset((("adapter", "full"), ("quantizer", name))) for name in ("nf4", "fp4", "int8")} <= REFUSED.keys()
    assert frozenset((("adapter", "peft.lora"), ("quantizer", "ternary"))) in REFUSED


def test_a_part_that_declares_a_need_is_refused_where_it_is_not_met():
    for kind in KINDS:
        for name, record in OFFERED[kind].items():
            if "teacher" in record.needs:
                given = attrs.evolve(Recipe.from_dict(settings_of({**USUAL, kind: name})), teacher=None)
                with expect_error("part-incompatible"):
                    check_parts(given, resolve_parts(given), "cpu")
