"""The acceptance list of OSFT, points 1 to 12: here, or in the file that the table names.

| point | test |
|---|---|
| 1 every optimizer | test_every_optimizer_leaves_the_main_directions_as_they_are |
| 2 triplets of the saved file | test_the_saved_weights_have_the_base_s_main_triplets_within_the_protected_subspace |
| 2 triplets of a layer | plugins/osft/tests/test_guarantee.py::test_the_first_singular_triplets_of_the_new_weight_within_the_protected_subspace_are_the_old_ones |
| 3 step 0 | test_before_the_first_step_the_logits_are_those_of_the_base |
| 4 keys and logits of the file | plugins/osft/tests/test_runs.py::test_the_merged_checkpoint_has_the_original_keys_and_is_read_by_plain_transformers |
| 5 ratio 0 | plugins/osft/tests/test_runs.py::test_ratio_zero_trains_nothing_non_targets_included |
| 5 ratio 1 | plugins/osft/tests/test_runs.py::test_ratio_one_is_the_trajectory_of_full_tuning_bit_for_bit |
| 5 floor in a model | plugins/osft/tests/test_runs.py::test_each_matrix_keeps_the_floor_of_its_smaller_side |
| 5 floor of a share | plugins/osft/tests/test_guarantee.py::test_the_rank_is_the_floor_of_the_share_as_it_was_written |
| 6 forgetting | plugins/osft/tests/test_forgetting.py::test_the_first_task_is_forgotten_less_at_an_equal_loss_of_the_second |
| 7 packing | core/tests/data/test_packing.py::test_every_rank_has_as_many_micro_batches_and_no_bin_is_over_the_limit |
| 7 fewer than upstream | core/tests/data/test_packing.py::test_there_are_fewer_and_fuller_micro_batches_than_upstream_makes |
| 7 cap | core/tests/data/test_packing.py::test_an_example_longer_than_the_limit_is_refused |
| 8 micro-batches | test_a_step_of_sgd_is_the_same_however_the_global_batch_is_cut |
| 8 ranks | plugins/osft/tests/test_runs.py::test_two_ranks_train_as_one_does |
| 9 packed rows | core/tests/model/test_attention.py::test_packed_documents_equal_separate_ones_in_values_and_gradients |
| 9 first tokens | core/tests/data/test_tokenise.py::test_labels_are_unshifted_and_only_the_batch_shifts |
| 10 resume | test_a_run_broken_off_in_its_second_epoch_ends_bit_equal_in_weights_optimizer_rates_and_order |
| 11 tokens | core/tests/training/test_loop.py::test_max_tokens_stops_at_the_step_that_reaches_it |
| 11 without end | core/tests/training/test_modes.py::test_a_run_without_end_goes_on_until_a_signal_and_then_from_there |
| 12 blocks | core/tests/data/test_blocks.py::test_every_token_comes_once_in_order_in_full_blocks_and_a_last_one |
"""

import ast
import json
from pathlib import Path

import luthier
import pytest
import torch
from luthier.plugins.contracts.metric_names import repeatable_numbers
from luthier.plugins.registry import installed_plugins
from luthier.state_tree import load_state
from luthier.testing.contexts import base_model, batch_logits, context, probe_batch
from luthier_osft import Osft
from luthier_osft.adapter import OsftAdapter
from luthier_osft.ranks import fixed_rank
from safetensors.torch import load_file

OF_GPUS = ("bnb.paged_adamw_8bit",)  # it refuses weights that are not on one
EVERY = sorted({offer.record.name for offer in installed_plugins().offers("optimizer")} - set(OF_GPUS))
FORMS = ("core", "factored")
CORE_FIRST = ("core", pytest.param("factored", marks=pytest.mark.slow))
FACTORED_FIRST = ("factored", pytest.param("core", marks=pytest.mark.slow))
PROBED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")


def leak(weight, change, rank):
    u, _, v = torch.linalg.svd(weight.double())
    parts = (u[:, :rank].T @ change.double()).norm(), (change.double() @ v[:rank].T).norm()
    return float(max(parts) / change.double().norm())


SAMPLE = [("adamw_8bit", "core", 6, "bf16"), ("schedule_free", "factored", 6, "float32")]
LONG = [pytest.param(name, form, 200, "float32", marks=pytest.mark.slow) for name in EVERY for form in FORMS]


@pytest.mark.parametrize(("optimizer", "form", "steps", "precision"), [*SAMPLE, *LONG])
def test_every_optimizer_leaves_the_main_directions_as_they_are(train, model_folder, optimizer, form, steps, precision):
    run = train(adapter=Osft(form=form), optimizer=optimizer, max_steps=steps, merge=True, precision=precision)
    base, tuned = (load_file(folder / "model.safetensors") for folder in (model_folder, run.merged))
    for name in PROBED:
        change = tuned[name] - base[name]
        rounding = 6e-8 * base[name].norm() / change.norm()
        assert change.norm() > 0 and leak(base[name], change, 24) < 1e-6 + rounding


@pytest.mark.parametrize("form", CORE_FIRST)
def test_the_saved_weights_have_the_base_s_main_triplets_within_the_protected_subspace(train, model_folder, form):
    run = train(adapter=Osft(form=form), max_steps=4, merge=True, precision="float32")
    base, tuned = (load_file(folder / "model.safetensors") for folder in (model_folder, run.merged))
    for name in PROBED:
        before, after = base[name].double(), tuned[name].double()
        rank = fixed_rank(min(before.shape), 0.25)
        u, s, v = torch.linalg.svd(before)
        size = s[0]
        assert torch.allclose(u[:, :rank].T @ after @ v[:rank].T, s[:rank].diag(), atol=1e-6 * size)
        assert torch.allclose(after @ v[:rank].T, u[:, :rank] * s[:rank], atol=1e-6 * size)
        assert (after - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_step_the_logits_are_those_of_the_base(form, dtype, bound):
    model, batch = base_model().to(dtype), probe_batch()
    before = batch_logits(model, batch)
    OsftAdapter(Osft(form=form)).attach(model, context(model))
    assert torch.allclose(batch_logits(model, batch), before, atol=bound, rtol=0)


@pytest.mark.parametrize("form", CORE_FIRST)
def test_a_step_of_sgd_is_the_same_however_the_global_batch_is_cut(train, tmp_path, model_folder, form):
    exact = {"model": {"name_or_path": str(model_folder), "dtype": "float64"}, "adapter": Osft(form=form)}
    ways = [{}, {"max_tokens_per_device": 60}, {"packing": False}]
    found = [
        load_file(train(**exact, **way, optimizer="sgd", max_steps=1, output_dir=tmp_path / f"{i}").artifact
                  / "osft.safetensors")
        for i, way in enumerate(ways)
    ]  # fmt: skip
    trained = [name for name in found[0] if not name.startswith("frozen.")]
    size = max(found[0][name].abs().max() for name in trained if name.endswith("core")) if form == "core" else 1.0
    assert size > 0
    for other in found[1:]:
        assert all(torch.allclose(other[n], found[0][n], atol=1e-9 * float(size), rtol=1e-9) for n in trained)


def is_equal(one, other):
    """True if two trees of state are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return one == other


def read_lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [repeatable_numbers(line) for line in lines]


@pytest.mark.parametrize("form", FACTORED_FIRST)
def test_a_run_broken_off_in_its_second_epoch_ends_bit_equal_in_weights_optimizer_rates_and_order(
    train, tmp_path, form
):
    def break_off(step):
        if step == 5:
            raise RuntimeError("power cut")

    shared = {"adapter": Osft(form=form, train_non_targets=True), "num_train_epochs": 2, "save_steps": 2,
              "async_save": False}  # fmt: skip
    train(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(RuntimeError, match="power cut"):
        train(**shared, exact_callbacks=["jsonl", luthier.on(step_ended=break_off)])
    train(**shared)
    folders = tmp_path / "straight", tmp_path / "run"
    one, other = (load_state(folder / "checkpoints/step-00000006") for folder in folders)
    for part in ("adapter", "optimizer", "feed"):
        assert is_equal(one[part], other[part]), part
    lines = [read_lines(folder) for folder in folders]
    assert lines[0] == lines[1] and len({line["learning_rate"] for line in lines[0]}) > 1


def named_tests(docstring):
    """(file, function) of each line of the table; a test without a file is one of this file."""
    cells = [line.split("|")[2].strip() for line in docstring.splitlines() if line.startswith("| ")][1:]
    return [cell.rpartition("::")[::2] for cell in cells]


@pytest.mark.parametrize("list_file", ["test_acceptance_osft.py", "test_acceptance_slao.py"])
def test_every_test_that_the_table_names_is_there(list_file):
    here = Path(__file__).with_name(list_file)
    rows = named_tests(ast.get_docstring(ast.parse(here.read_text())))
    assert len(rows) > 6
    for file, function in rows:
        tree = ast.parse((here.parents[1] / file).read_text() if file else here.read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, function)
