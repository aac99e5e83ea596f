"""The three forms of a linear head, against all logits at once in float64: values, gradients, statistics, memory."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from luthier.errors import LuthierError
from luthier.hardware.memory_meter import Allocations
from luthier.model.head import direct, tiles
from luthier.model.head.direct import InForward, OnePass, Recompute, multiple, score_labels
from luthier.model.head.tiles import Curve, Linear, cut_blocks
from torch.utils._python_dispatch import TorchDispatchMode

CURVES = [Curve(), Curve(scale=0.25), Curve(cap=5.0), Curve(scale=2.0, cap=3.0)]
BOUNDS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}


class Case:
    """A random head with S rows, their labels, and the gradients that come for log-probabilities and entropies."""

    def __init__(self, count=13, hidden=16, vocabulary=50, *, curve=CURVES[0], bias=False, dtype=torch.float64, seed=0):
        random = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        self.curve, self.dtype, self.count = curve, dtype, count
        self.rows, self.weight = draw(count, hidden), draw(vocabulary, hidden) / 2
        self.bias = draw(vocabulary) if bias else None
        self.labels = torch.randint(0, vocabulary, (count,), generator=random)
        exact = torch.promote_types(torch.float32, dtype)
        self.factors, self.spread = draw(count).to(exact), draw(count).to(exact)

    def leaves(self, trains):
        """Rows, weight and bias anew, and the head of the latter."""
        rows = self.rows.clone().requires_grad_()
        weight = self.weight.clone().requires_grad_(trains)
        bias = None if self.bias is None else self.bias.clone().requires_grad_(trains)
        return rows, Linear(weight=weight, bias=bias, curve=self.curve, dtype=self.dtype)

    def reference(self, entropy=False):
        """Everything by all logits at once."""
        rows, weight = (t.double().clone().requires_grad_() for t in (self.rows, self.weight))
        bias = None if self.bias is None else self.bias.double().clone().requires_grad_()
        logits = torch.nn.functional.linear(rows, weight, bias) * self.curve.scale
        if self.curve.cap is not None:
            logits = self.curve.cap * torch.tanh(logits / self.curve.cap)
        logs = logits.log_softmax(-1)
        logprobs, entropies = logs.gather(1, self.labels[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
        total = (logprobs * self.factors.double()).sum() + entropy * (entropies * self.spread.double()).sum()
        total.backward()
        return {
            "logprobs": logprobs.detach(),
            "entropy": entropies.detach(),
            "top1": (logits.argmax(-1) == self.labels).double(),
            "rows": rows.grad,
            "weight": weight.grad,
            "bias": None if bias is None else bias.grad,
        }

    def found(self, form, entropy=False):
        rows, head = self.leaves(form != "one-pass")
        want = ("top1",) if form == "gradient in forward" else ("entropy", "top1")
        if form == "one-pass":
            logprobs, entropies, top1 = OnePass.apply(rows, head, self.labels, want)
        elif form == "recompute":
            logprobs, entropies, top1 = Recompute.apply(rows, head.weight, head.bias, head, self.labels, want)
        else:
            told = self.factors * 4  # known but for a number
            logprobs, entropies, top1 = InForward.apply(rows, head.weight, head.bias, head, self.labels, want, told)
        total = (logprobs * self.factors).sum() + (entropy * (entropies * self.spread).sum() if entropy else 0.0)
        total.backward()
        gradients = {
            "rows": rows.grad,
            "weight": head.weight.grad,
            "bias": None if head.bias is None else head.bias.grad,
        }
        return {"logprobs": logprobs.detach(), "entropy": entropies, "top1": top1, **gradients}


def compare(found, expected, bound, names):
    for name in names:
        if found[name] is not None and expected[name] is not None:
            mine, theirs = found[name].detach().double(), expected[name]
            assert (mine - theirs).norm() <= bound * (theirs.norm() + 1), name


FORMS = ["one-pass", "gradient in forward", "recompute"]
ALL = ("logprobs", "entropy", "top1", "rows", "weight", "bias")


@pytest.fixture
def small(monkeypatch):
    """Tiles and blocks so small that every border is met."""

    def set_to(rows, width):
        monkeypatch.setattr(direct, "ROWS", rows)
        monkeypatch.setattr(direct, "SMALL", 0)
        monkeypatch.setattr(tiles, "NARROWEST", width)
        monkeypatch.setitem(tiles.TILE, "cpu", 1)

    return set_to


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("curve", CURVES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_each_form_gives_the_values_and_gradients_of_all_logits_at_once(form, dtype, curve, bias, small):
    small(5, 7)
    case = Case(curve=curve, bias=bias, dtype=dtype)
    names = [n for n in ALL if n != "top1"] if dtype == torch.bfloat16 else ALL  # a tie in bfloat16 is none in float64
    compare(case.found(form), case.reference(), BOUNDS[dtype], names)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    count=st.integers(0, 12),
    vocabulary=st.integers(1, 23),
    rows=st.integers(1, 6),
    width=st.integers(1, 9),
    curve=st.sampled_from(CURVES),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_wherever_tiles_and_blocks_end_nothing_changes(count, vocabulary, rows, width, curve, form, seed):
    case = Case(count, 4, vocabulary, curve=curve, bias=True, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "ROWS", rows)
        patch.setattr(tiles, "NARROWEST", width)
        patch.setitem(tiles.TILE, "cpu", 1)
        compare(case.found(form), case.reference(), 1e-11, ALL)


@pytest.mark.parametrize("form", ["one-pass", "recompute"])
@pytest.mark.parametrize("curve", CURVES, ids=str)
def test_entropies_have_their_gradient_too(form, curve, small):
    small(5, 7)
    case = Case(curve=curve, bias=True)
    compare(case.found(form, entropy=True), case.reference(entropy=True), 1e-11, ALL)


def test_an_entropy_without_log_probability_has_its_gradient(small):
    small(5, 7)
    case = Case()
    case.factors.zero_()
    rows, head = case.leaves(False)
    _, entropies, _ = OnePass.apply(rows, head, case.labels, ("entropy",))
    (entropies * case.spread).sum().backward()
    compare({"rows": rows.grad}, case.reference(entropy=True), 1e-11, ["rows"])


def test_without_gradient_the_statistics_are_the_same(small):
    small(5, 7)
    case = Case(bias=True)
    logprobs, entropies, top1 = score_labels(case.leaves(True)[1], case.rows, case.labels, ("entropy", "top1"))
    assert not logprobs.requires_grad
    compare({"logprobs": logprobs, "entropy": entropies, "top1": top1}, case.reference(), 1e-11, ALL[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("margin", [9.0, 40.0, 200.0, -200.0])
def test_a_label_that_is_sure_or_impossible_keeps_its_gradient(form, margin, dtype):
    """What is left of 1 - p is not lost in rounding, and nothing overflows."""
    case = Case(4, 8, 30, dtype=dtype)
    case.rows.zero_()[:, 0] = 1.0
    case.weight[:, 0] = 0.0
    case.labels.fill_(3)
    case.weight[3, 0] = margin
    compare(case.found(form), case.reference(), BOUNDS[dtype] / (1 if margin > 9 else 3), ("logprobs",))
    found, expected = case.found(form)["rows"].double(), case.reference()["rows"]
    assert (found - expected).norm() <= BOUNDS[dtype] * expected.norm() + 1e-30


def test_of_equal_logits_the_first_is_the_most_likely(small):
    small(5, 3)
    case = Case(7, 4, 11)
    case.weight[8] = case.weight[2]
    case.labels[:] = torch.tensor([2, 8, 2, 8, 2, 8, 1])
    found, expected = case.found("one-pass"), case.reference()
    assert torch.equal(found["top1"], expected["top1"])


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_no_values_and_a_gradient_of_zero(form):
    case = Case(count=0, bias=True)
    found = case.found(form)
    assert found["logprobs"].shape == (0,) and found["rows"].shape == (0, 16)
    if form != "one-pass":
        assert not found["weight"].any() and not found["bias"].any()


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
@pytest.mark.parametrize("form", ["gradient in forward", "recompute"])
def test_a_bias_or_weight_that_is_frozen_gets_no_gradient(form, trained):
    case = Case(bias=True)
    rows, head = case.leaves(True)
    head.weight.requires_grad_(trained[0])
    head.bias.requires_grad_(trained[1])
    if form == "recompute":
        found = Recompute.apply(rows, head.weight, head.bias, head, case.labels, ())[0]
    else:
        found = InForward.apply(rows, head.weight, head.bias, head, case.labels, (), case.factors)[0]
    (found * case.factors).sum().backward()
    assert ((head.weight.grad is not None), (head.bias.grad is not None)) == trained
    compare({"weight": head.weight.grad, "bias": head.bias.grad}, case.reference(), 1e-11, ("weight", "bias"))


def test_the_weights_gradient_is_summed_in_the_dtype_it_is_kept_in(small):
    """Pure bfloat16 keeps gradients in float32; rounding each micro-batch's would lose the small ones."""
    small(5, 7)
    case = Case(dtype=torch.bfloat16)
    rows, head = case.leaves(True)
    head.weight.grad_dtype = torch.float32
    found = Recompute.apply(rows, head.weight, head.bias, head, case.labels, ())[0]
    (found * case.factors).sum().backward()
    assert head.weight.grad.dtype == torch.float32
    assert not torch.equal(head.weight.grad, head.weight.grad.bfloat16().float())


def test_coefficients_that_are_not_the_gradient_are_refused():
    case = Case()
    rows, head = case.leaves(True)
    found = InForward.apply(rows, head.weight, None, head, case.labels, (), case.factors)[0]
    with pytest.raises(LuthierError) as caught:
        (found * case.factors.abs()).sum().backward()
    assert caught.value.code == "part-invalid" and "coefficients" in caught.value.problem


@pytest.mark.parametrize(
    ("came", "told", "number"),
    [
        ([2.0, -4.0], [1.0, -2.0], 2.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [3.0, 1.0], 0.0),
        ([], [], 0.0),
        ([float("nan"), 1.0], [2.0, 1.0], float("nan")),  # a loss that is not finite is for the engine to name
    ],
)
def test_the_number_between_gradient_and_coefficients(came, told, number):
    found = multiple(torch.tensor(came), torch.tensor(told))
    assert found == pytest.approx(number, nan_ok=True)


def test_a_gradient_where_none_is_declared_is_refused():
    with pytest.raises(LuthierError):
        multiple(torch.tensor([1.0]), torch.tensor([0.0]))


def test_blocks_are_even_and_cover_everything():
    assert [(s.start, s.stop) for s in cut_blocks(10, 4)] == [(0, 3), (3, 6), (6, 10)]
    assert cut_blocks(0, 4) == [slice(0, 0)]


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("form", ["one-pass", "recompute", "none"])
def test_logits_of_a_large_vocabulary_are_never_held(form):
    """128 rows of 128k float32 logits would be 66 MB."""
    case = Case(128, 8, 128_000, dtype=torch.bfloat16)
    with Largest() as seen, Allocations() as held:
        score_labels(case.leaves(False)[1], case.rows, case.labels, ("top1",)) if form == "none" else case.found(form)
    assert seen.largest <= 4 * tiles.TILE["cpu"]
    assert held.peak <= 32 * 2**20


def test_gradient_in_forward_keeps_no_more_than_is_said():
    case = Case(512, 64, 40_000, dtype=torch.bfloat16)
    weight = 40_000 * 64 * 4
    with Largest() as seen, Allocations() as held:
        case.found("gradient in forward")
    assert seen.largest <= max(direct.SMALL, weight)
    assert held.peak <= direct.SMALL + 4 * tiles.TILE["cpu"] + 3 * weight
