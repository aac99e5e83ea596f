"""Value and gradient are TRL's and those of the definition, in float64; the teacher is never trained."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Recipe
from luthier.plugins.completion import add_defaults
from luthier.testing import expect_error
from luthier.testing.drawn_units import DrawnUnit, lay_out_units, pack_examples
from luthier.testing.policies import TablePolicy
from luthier.testing.strategies import Document
from luthier_distill import Distill
from luthier_distill.divergences import DIVERGENCES, likeliest, mixed_divergence
from luthier_distill.hidden_states import relation_distances
from luthier_distill.loss import DistillLoss
from luthier_distill.whole_divergence import WholeDivergence

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 1 << 16)
scales = st.sampled_from((0.01, 1.0, 8.0))
temperatures = st.sampled_from((0.5, 1.0, 3.0))
WIDTH = 8


class Pair(TablePolicy):
    """A policy whose teacher is another table of our own."""

    def __init__(self, logits, teacher):
        super().__init__(logits)
        self.theirs = teacher

    def teacher(self):
        return TablePolicy(self.theirs)


def drawn(seed, scale, lengths=(3, 5)):
    """A batch of documents whose labels all count, and both tables [T, V]."""
    chance = torch.Generator().manual_seed(seed)
    units = []
    for length in lengths:
        ids = tuple(torch.randint(0, WIDTH, (length,), generator=chance).tolist())
        units.append(DrawnUnit(documents={"text": Document(ids=ids, supervised=(True,) * length)}))
    batch = pack_examples(lay_out_units(add_defaults(DistillLoss(Distill()), "loss"), units))
    tables = [torch.randn(batch.num_tokens, WIDTH, generator=chance, dtype=torch.float64) * scale for _ in range(2)]
    return batch, tables


def mean_of(options, batch, student, teacher):
    loss = add_defaults(DistillLoss(options), "loss")
    output, terms = loss(Pair(student, teacher), batch), loss.terms(batch)
    return sum(value / terms[name] for name, value in output.sums.items())


@pytest.mark.parametrize(("divergence", "beta"), [("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0.1), ("jsd", 0.5)])
@few
@given(seed=seeds, scale=scales, temperature=temperatures)
def test_a_divergence_is_that_of_trls_gkd(divergence, beta, seed, scale, temperature):
    """TRL's has no square of the temperature."""
    from trl.experimental.gkd import GKDTrainer

    batch, (student, teacher) = drawn(seed, scale)
    ours, theirs = student.clone().requires_grad_(True), student.clone().requires_grad_(True)
    options = Distill(divergence=divergence, beta=beta if divergence == "jsd" else None, temperature=temperature)
    found = mean_of(options, batch, ours, teacher)
    sources = batch.previous[batch.supervised]
    expected = temperature**2 * GKDTrainer.generalized_jsd_loss(
        theirs[sources][None], teacher[sources][None], batch.labels[batch.supervised][None], beta, temperature
    )
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("add_tail", [True, False])
@few
@given(seed=seeds, scale=st.sampled_from((0.01, 1.0)), count=st.integers(2, WIDTH - 1))
def test_the_likeliest_tokens_are_those_of_trls_server_distillation(add_tail, seed, scale, count):
    from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer

    batch, (student, teacher) = drawn(seed, scale)
    ours, theirs = student.clone().requires_grad_(True), student.clone().requires_grad_(True)
    found = mean_of(Distill(top_k=count, add_tail=add_tail), batch, ours, teacher)
    sources = batch.previous[batch.supervised]
    best = teacher[sources].log_softmax(-1).topk(count)
    trainer = SimpleNamespace(
        loss_add_tail=add_tail, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
    )
    expected = ServerDistillationTrainer._compute_server_forward_kl_loss(
        trainer,
        {"topk_logprobs": best.values[None], "topk_token_ids": best.indices[None]},
        theirs[sources].log_softmax(-1)[None],
        batch.labels[batch.supervised][None],
    )
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


@few
@given(seed=seeds, scale=scales, weight=st.sampled_from((0.1, 3.0)))
def test_the_labels_cross_entropy_is_added_by_its_weight(seed, scale, weight):
    batch, (student, teacher) = drawn(seed, scale)
    plain, mixed = (mean_of(Distill(ce_weight=w), batch, student, teacher) for w in (0.0, weight))
    rows, labels = student[batch.previous[batch.supervised]], batch.labels[batch.supervised]
    torch.testing.assert_close(mixed, plain + weight * torch.nn.functional.cross_entropy(rows, labels))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@few
@given(seed=seeds, scale=scales, top_k=st.sampled_from((None, 2, WIDTH)))
def test_a_model_that_is_its_teacher_has_nothing_to_learn_and_the_teacher_never_learns(divergence, seed, scale, top_k):
    batch, (student, teacher) = drawn(seed, scale)
    student.requires_grad_(True)
    same = mean_of(Distill(divergence=divergence, top_k=top_k), batch, student, student.detach())
    same.backward()
    assert float(same.detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(student.grad.abs().max()) < 1e-12
    apart = mean_of(Distill(divergence=divergence, top_k=top_k), batch, student, teacher)
    assert float(apart.detach()) > 0
    assert teacher.grad is None


@few
@given(seed=seeds, temperature=temperatures)
def test_metrics_are_the_share_of_like_choices_and_the_labels_nats(seed, temperature):
    batch, (student, teacher) = drawn(seed, 1.0)
    loss = add_defaults(DistillLoss(Distill(temperature=temperature)), "loss")
    found = {name: float(s) / float(c) for name, (s, c) in loss(Pair(student, teacher), batch).metrics.items()}
    sources, labels = batch.previous[batch.supervised], batch.labels[batch.supervised]
    alike = (student[sources].argmax(-1) == teacher[sources].argmax(-1)).double().mean()
    assert found["teacher_agreement"] == pytest.approx(float(alike))
    assert found["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(student[sources], labels)))


@few
@given(seed=seeds, scale=scales, beta=st.sampled_from((0.1, 0.5)))
def test_the_mixed_divergence_is_symmetric_where_the_shares_are_exchanged(seed, scale, beta):
    _, tables = drawn(seed, scale)
    one, two = (table.log_softmax(-1) for table in tables)
    torch.testing.assert_close(mixed_divergence(one, two, beta), mixed_divergence(two, one, 1 - beta))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_logits_of_any_size_have_finite_values_and_gradients(divergence, top_k):
    sizes = torch.tensor([0.0, -3e-8, 1e4, -1e4])
    own = torch.cartesian_prod(sizes, sizes, sizes).requires_grad_(True)
    theirs = own.detach().flip(0)
    sides = own.log_softmax(-1), theirs.log_softmax(-1)
    if top_k is None:
        found = WholeDivergence.apply(own, theirs, divergence, 1.0, 0.5)
    else:
        found = DIVERGENCES[divergence](*likeliest(*sides, top_k, True), 0.5)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(own.grad).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@few
@given(seed=seeds, scale=scales, temperature=temperatures, beta=st.sampled_from((0.1, 0.5)))
def test_the_gradient_made_with_the_value_is_that_of_autograd(divergence, seed, scale, temperature, beta):
    torch.manual_seed(seed)
    own, theirs = (scale * torch.randn(4, WIDTH, dtype=torch.float64) for _ in range(2))
    factors, pair = torch.randn(4, dtype=torch.float64), [own.clone().requires_grad_(True) for _ in range(2)]
    found = WholeDivergence.apply(pair[0], theirs, divergence, temperature, beta)
    sides = [(side / temperature).log_softmax(-1) for side in (pair[1], theirs)]
    expected = temperature**2 * DIVERGENCES[divergence](*sides, beta)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for values in (found, expected):
        (values * factors).sum().backward()
    torch.testing.assert_close(pair[0].grad, pair[1].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_takes_few_tensors_as_wide_as_the_vocabulary(divergence):
    """In float32: three, or four of a mixture, where autograd of the formulas takes five and nine."""
    from luthier.hardware.memory_meter import Meter

    own, theirs = (torch.randn(4, 4096, dtype=torch.bfloat16) for _ in range(2))
    own.requires_grad_(True)
    with Meter() as meter:
        WholeDivergence.apply(own, theirs, divergence, 1.0, 0.5).sum().backward()
    assert meter.ledger.peak < (4.01 if divergence == "jsd" else 3.01) * own.numel() * 4


@pytest.mark.parametrize(
    ("given_options", "problem"),
    [
        ({"beta": 0.5}, ("Distill.beta",)),
        ({"add_tail": False}, ("Distill.add_tail", "top_k")),
        ({"top_k": 1, "add_tail": False}, ("Distill.top_k",)),
        ({"temperature": 0.0}, ("temperature",)),
        ({"divergence": "kl"}, ("divergence",)),
    ],
)
def test_options_that_would_do_nothing_are_refused(given_options, problem):
    with pytest.raises(LuthierError) as caught:
        Distill(**given_options)
    assert all(fact in str(caught.value) for fact in problem)


def test_a_recipe_without_a_teacher_is_refused_before_any_work():
    recipe = Recipe.from_dict({"model": "demo", "data": "rows.jsonl", "loss": "distill"})
    import luthier

    with expect_error("part-incompatible"):
        luthier.plan(recipe)


@pytest.mark.parametrize("distance", ["cosine", "mse", "relation"])
@few
@given(seed=seeds, scale=scales)
def test_hidden_states_like_the_teachers_cost_nothing_and_pull_towards_it(distance, seed, scale):
    batch, (student, teacher) = drawn(seed, scale)
    options = Distill(hidden_weight=2.0, hidden_distance=distance)

    def cost(table):
        return mean_of(options, batch, table, teacher) - mean_of(Distill(), batch, table, teacher)

    same = mean_of(options, batch, teacher, teacher)
    assert float(same) == pytest.approx(0.0, abs=1e-9)
    student.requires_grad_(True)
    added = cost(student)
    (pull,) = torch.autograd.grad(added, student)
    nearer = cost(student.detach() - 1e-6 * pull)
    assert 0 < float(nearer) <= float(added.detach())


@few
@given(seed=seeds, width=st.integers(2, 9))
def test_relations_are_of_each_document_and_know_neither_turn_nor_width_nor_size(seed, width):
    torch.manual_seed(seed)
    own, theirs = torch.randn(7, width, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    of_document = torch.tensor([0, 0, 0, 2, 2, 1, 2])
    found = relation_distances(own, theirs, of_document)
    turned = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    torch.testing.assert_close(relation_distances(3.0 * own @ turned, theirs, of_document), found)
    wider = torch.cat([own, torch.zeros(7, 2, dtype=torch.float64)], dim=-1)
    torch.testing.assert_close(relation_distances(own, wider, of_document), torch.zeros(7, dtype=torch.float64))
    for document in range(3):
        alone = of_document == document
        apart = torch.nn.functional.cosine_similarity
        gaps = [apart(side[alone][:, None], side[alone][None], dim=-1) for side in (own, theirs)]
        torch.testing.assert_close(found[alone], (gaps[0] - gaps[1]).square().mean(-1))
    assert float(found[of_document == 1]) == pytest.approx(0.0, abs=1e-12)  # a state alone has no relations


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"hidden_layers": [1]}, "hidden_weight"),
        ({"hidden_weight": 1.0, "hidden_layers": [1, 2], "teacher_layers": [1]}, "2 layers"),
        ({"hidden_weight": 1.0, "hidden_layers": []}, "at least one"),
    ],
)
def test_hidden_options_that_say_nothing_or_do_not_match_are_refused(given, says):
    with pytest.raises(LuthierError) as caught:
        Distill(**given)
    assert says in f"{caught.value} {caught.value.remedy}"


def test_relations_are_those_of_float32_where_products_are_in_bfloat16():
    common, drawn = torch.randn(1, 64), torch.randn(2, 32, 64)
    own, theirs = (common + 0.02 * part for part in drawn)
    document = torch.zeros(32, dtype=torch.long)
    expected = relation_distances(own, theirs, document)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(relation_distances(own, theirs, document), expected)
