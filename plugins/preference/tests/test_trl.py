"""Value, gradient and metrics of each loss are those of TRL's own trainers, in float64, on drawn logits."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.plugins.completion import add_defaults
from luthier.testing.drawn_units import DrawnUnit, lay_out_units, pack_examples
from luthier.testing.policies import TablePolicy
from luthier.testing.strategies import Document
from luthier_preference import ApoZeroUnpaired, Cpo, Dpo, Kto, Orpo, Reward, Simpo
from luthier_preference.cpo import CpoLoss, SimpoLoss
from luthier_preference.dpo import DpoLoss
from luthier_preference.formulas import FORMULAS, Sides, diverge
from luthier_preference.kto import ApoZeroUnpairedLoss, KtoLoss
from luthier_preference.options import DIVERGING
from luthier_preference.orpo import OrpoLoss
from luthier_preference.reward import RewardLoss
from torch.nn.utils.rnn import pad_sequence

WIDTH = 8  # tokens of the vocabulary
lengths = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))  # of a prompt and of both answers
drawn_pairs = st.lists(lengths, min_size=1, max_size=4)
betas = st.sampled_from((0.05, 0.3, 2.0))
shares = st.sampled_from((0.001, 0.1, 0.4))
scales = st.sampled_from((0.01, 1.0, 8.0))
seeds = st.integers(0, 1 << 16)
few = settings(max_examples=12, deadline=None)
ACCELERATOR = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value, gather=lambda value: value)


@pytest.fixture(autouse=True, scope="module")
def exact():
    """TRL makes constants in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def document(prompt, answer, chance):
    ids = torch.randint(0, WIDTH, (prompt + answer,), generator=chance).tolist()
    return Document(ids=tuple(ids), supervised=(False,) * prompt + (True,) * answer)


class Drawn:
    """A batch of ours over a table of drawn logits, and the same rows padded as TRL's collators pad them."""

    def __init__(self, loss, units, seed, scale):
        self.loss = add_defaults(loss, "loss")
        self.batch = pack_examples(lay_out_units(self.loss, units))
        chance = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(self.batch.num_tokens, WIDTH, generator=chance) * scale

    def ours(self):
        """Objective, gradient of the table, means of the metrics."""
        table = self.logits.clone().requires_grad_(True)
        output, terms = self.loss(TablePolicy(table), self.batch), self.loss.terms(self.batch)
        total = sum(value / terms[name] for name, value in output.sums.items())
        total.backward()
        means = {n: float(s) / float(c) for n, (s, c) in output.metrics.items() if float(c)}
        return float(total.detach()), table.grad, means

    def padded(self, name):
        """Ids, mask, mask of the answer and places in the table of each unit's document, [U, L] each."""
        starts = self.batch.document_starts
        spans = [torch.arange(starts[d], starts[d + 1]) for d in self.batch.documents(name).tolist()]
        ids = pad_sequence([self.batch.input_ids[s] for s in spans], True, 0)
        mask = pad_sequence([torch.ones(len(s), dtype=torch.int64) for s in spans], True, 0)
        answers = pad_sequence([(self.batch.labels[s] != -100).long() for s in spans], True, 0)
        return SimpleNamespace(ids=ids, mask=mask, answers=answers, places=pad_sequence(spans, True, 0))


def pairs_for(loss, drawn, seed, scale):
    chance = torch.Generator().manual_seed(seed + 1)
    units = [
        DrawnUnit(documents={"chosen": document(p, c, chance), "rejected": document(p, r, chance)}) for p, c, r in drawn
    ]
    return Drawn(loss, units, seed, scale)


def together(sides):
    """The rows of both sides below each other, padded to one length."""
    width = max(side.ids.shape[1] for side in sides)
    parts = {
        name: torch.cat([torch.nn.functional.pad(getattr(s, name), (0, width - s.ids.shape[1])) for s in sides])
        for name in ("ids", "mask", "answers", "places")
    }
    return SimpleNamespace(**parts)


class FusedHead(torch.nn.Module):
    """The model as TRL's trainers patch it, over the table: log-probabilities of labels in the place of logits."""

    is_gradient_checkpointing = False

    def __init__(self, table, rows):
        super().__init__()
        self.table, self.rows = table, rows

    def forward(self, input_ids, attention_mask, labels, use_cache=False, fused_lm_head=True):
        assert torch.equal(self.rows[0].ids, input_ids)
        places = self.rows[0].places
        logits = self.table[places][:, :-1]
        logprobs, targets = logits.log_softmax(-1), labels[:, 1:]
        own = logprobs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        own = torch.where(targets >= 0, own, 0.0)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        top = logits.argmax(-1) == targets
        return SimpleNamespace(log_probs=own, entropy=entropy, mean_logits=logits.mean(-1), is_top1=top)


class InTurn(FusedHead):
    """TRL asks it about mismatched rows first, then about the rows themselves."""

    def forward(self, input_ids, attention_mask, labels, use_cache=False, fused_lm_head=True):
        found = super().forward(input_ids, attention_mask, labels)
        self.rows = self.rows[1:]
        return found


class PlainHead(torch.nn.Module):
    """A model over the table that gives logits."""

    def __init__(self, table, rows):
        super().__init__()
        self.table, self.rows = table, rows

    def forward(self, input_ids, attention_mask, use_cache=False):
        assert torch.equal(input_ids, self.rows.ids)
        return SimpleNamespace(logits=self.table[self.rows.places])


def made(trainer, **state):
    found = object.__new__(trainer)
    found.__dict__.update({"accelerator": ACCELERATOR, "aux_loss_enabled": False} | state)
    return found


def assert_equal(ours, total, table, metrics):
    total.backward()
    assert ours[0] == pytest.approx(float(total), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(ours[1], table.grad, rtol=1e-9, atol=1e-9 * max(1.0, float(table.grad.abs().max())))
    for name, value in ours[2].items():
        close = 1e-6 if name == "rewards/accuracies" else 1e-9  # TRL's mean of accuracies is float32
        assert value == pytest.approx(float(metrics[name]), rel=close, abs=1e-12), name


def sides_of(ratios):
    """Answers of one token each whose reference is certain."""
    return Sides(ratios=ratios, logps=ratios, reference=torch.zeros_like(ratios), lengths=torch.ones_like(ratios))


def assert_dpo_is_trls(options, drawn, seed, scale):
    from trl import DPOTrainer

    found = pairs_for(DpoLoss(options), drawn, seed, scale)
    rows = together([found.padded("chosen"), found.padded("rejected")])
    table = found.logits.clone().requires_grad_(True)
    model = FusedHead(table, [rows])
    recorded = {mode: defaultdict(list) for mode in ("train", "eval")}
    trainer = made(
        DPOTrainer, model=model, ref_model=FusedHead(found.logits.roll(1, -1), [rows]),
        ld_alpha=options.ld_alpha,
        precompute_ref_logps=False, f_divergence_type=options.f_divergence_type, loss_types=list(options.mixture),
        loss_weights=list(options.mixture.values()), beta=options.beta, label_smoothing=options.label_smoothing,
        use_weighting=False, _metrics=recorded, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.discopop_tau),
    )  # fmt: skip
    given = {"input_ids": rows.ids, "attention_mask": rows.mask, "completion_mask": rows.answers}
    total = trainer._compute_loss(model, given, return_outputs=False)
    objective, gradient, means = found.ours()
    parts = {name: means.pop(f"part/{name}") for name in options.mixture if f"part/{name}" in means}
    assert_equal((objective, gradient, means), total, table, {n: v[-1] for n, v in recorded["train"].items()})
    assert parts.keys() == (options.mixture.keys() if len(options.mixture) > 1 else set())
    assert sum(parts.values()) == pytest.approx(objective if parts else 0, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss_type", [n for n in (*FORMULAS, "sft") if n not in ("robust", "exo_pair", "discopop")])
@few
@given(drawn=drawn_pairs, seed=seeds, scale=scales, beta=betas)
def test_dpo_is_trls(loss_type, drawn, seed, scale, beta):
    assert_dpo_is_trls(Dpo(loss_type=loss_type, beta=beta), drawn, seed, scale)


@few
@given(drawn=drawn_pairs, seed=seeds, scale=st.sampled_from((0.01, 1.0)), beta=st.sampled_from((0.05, 0.3)),
       tau=st.sampled_from((0.05, 1.0)))  # fmt: skip
def test_discopop_is_trls(drawn, seed, scale, beta, tau):
    assert_dpo_is_trls(Dpo(loss_type="discopop", beta=beta, discopop_tau=tau), drawn, seed, scale)


@pytest.mark.parametrize("loss_type", ["robust", "exo_pair", "aot", "aot_unpaired"])
@few
@given(drawn=drawn_pairs, seed=seeds, scale=scales, beta=betas, share=shares)
def test_smoothed_dpo_is_trls(loss_type, drawn, seed, scale, beta, share):
    assert_dpo_is_trls(Dpo(loss_type=loss_type, beta=beta, label_smoothing=share), drawn, seed, scale)


@few
@given(drawn=drawn_pairs, seed=seeds, scale=scales, alpha=st.sampled_from((0.0, 0.3, 1.0)),
       types=st.lists(st.sampled_from([*FORMULAS, "sft"]), unique=True, min_size=1, max_size=4))  # fmt: skip
def test_a_weighted_mixture_with_shorter_tails_is_trls(drawn, seed, scale, alpha, types):
    smoothed = {"label_smoothing": 0.1} if {"robust", "exo_pair"} & set(types) else {}
    tails = {"ld_alpha": alpha} if types != ["sft"] else {}
    weights = [0.8, 0.2, 1.0, 3.0][: len(types)]
    calm = min(scale, 1.0) if "discopop" in types else scale
    if smoothed:  # which TRL's sigmoid ignores
        types = [name for name in types if name != "sigmoid"]
    options = Dpo(loss_type=types, loss_weights=weights[: len(types)], **smoothed, **tails)
    assert_dpo_is_trls(options, drawn, seed, calm)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@few
@given(drawn=drawn_pairs, seed=seeds, loss_type=st.sampled_from(DIVERGING), beta=st.sampled_from((0.05, 0.3)))
def test_a_divergence_is_trls(divergence, drawn, seed, loss_type, beta):
    smoothed = {"label_smoothing": 0.1} if loss_type in ("robust", "exo_pair") else {}
    options = Dpo(loss_type=loss_type, beta=beta, f_divergence_type=divergence, **smoothed)
    assert_dpo_is_trls(options, drawn, seed, 1.0)


@few
@given(seed=seeds, alpha=st.sampled_from((-1.0, 0.0, 0.5, 1.0, 2.0)))
def test_the_alpha_divergence_is_that_of_its_definition(seed, alpha):
    """TRL's goes through float32."""
    ratios = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed))
    likeness = ratios.exp()
    expected = ratios if alpha == 1.0 else (likeness ** (alpha - 1) - 1) / (alpha - 1)
    found = diverge(ratios, Dpo(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@few
@given(drawn=drawn_pairs, seed=seeds, margins=st.booleans(), centre=st.sampled_from((0.0, 0.01, 1.0)))
def test_reward_modelling_is_trls(drawn, seed, margins, centre):
    from trl import RewardTrainer

    chance = torch.Generator().manual_seed(seed + 1)
    gaps = torch.randint(-2, 9, (len(drawn),), generator=chance) / 4.0 if margins else None  # exact in float32
    units = [
        DrawnUnit(
            documents={"chosen": document(p, c, chance), "rejected": document(p, r, chance)},
            columns={} if gaps is None else {"margin": float(gaps[i])},
        )
        for i, (p, c, r) in enumerate(drawn)
    ]
    found = Drawn(RewardLoss(Reward(token=3, center_rewards_coefficient=centre)), units, seed, 1.0)
    rows = together([found.padded("chosen"), found.padded("rejected")])
    table = found.logits.clone().requires_grad_(True)
    ends = rows.places.gather(1, rows.mask.sum(1, keepdim=True) - 1).squeeze(1)
    recorded = {mode: defaultdict(list) for mode in ("train", "eval")}
    trainer = made(RewardTrainer, model=SimpleNamespace(training=True), _metrics=recorded, _total_train_tokens=0,
                   _tp_size=1, args=SimpleNamespace(center_rewards_coefficient=centre or None))  # fmt: skip
    given = {"input_ids": rows.ids, "attention_mask": rows.mask} | ({} if gaps is None else {"margin": gaps})
    total = trainer.compute_loss(lambda **_: SimpleNamespace(logits=table[ends, 3:4]), given)
    ours, theirs = found.ours(), recorded["train"]
    assert_equal((*ours[:2], {}), total, table, {})
    assert ours[2]["rewards/accuracies"] == pytest.approx(theirs["accuracy"][0], rel=1e-6)
    assert ours[2]["rewards/margins"] == pytest.approx(theirs["margin"][0], rel=1e-6, abs=1e-6)
    mean = (ours[2]["rewards/chosen"] + ours[2]["rewards/rejected"]) / 2
    assert mean == pytest.approx(theirs["mean_reward"][0], rel=1e-6, abs=1e-6)


@few
@given(seed=seeds, beta=betas, share=shares)
def test_smoothed_sigmoid_is_that_of_trls_cpo_on_log_ratios(seed, beta, share):
    """TRL's DPO has no smoothing of sigmoid; its CPO has."""
    from trl.experimental.cpo import CPOTrainer

    options = Dpo(beta=beta, label_smoothing=share)
    ratios = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed)) * 20
    trainer = made(CPOTrainer, alpha=0.0, loss_type="sigmoid", beta=beta, label_smoothing=share)
    expected, *_ = trainer.cpo_loss(ratios[:, 0], ratios[:, 1])
    found = FORMULAS["sigmoid"](sides_of(ratios), options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def pair_columns(found):
    given = {}
    for name in ("chosen", "rejected"):
        side = found.padded(name)
        given[f"{name}_input_ids"], given[f"{name}_attention_mask"] = side.ids, side.mask
        given[f"{name}_labels"] = side.ids.masked_fill(side.answers == 0, -100)
    return given


def assert_pairs_are_trls(trainer, found):
    table = found.logits.clone().requires_grad_(True)
    rows = together([found.padded("chosen"), found.padded("rejected")])
    total, metrics = trainer.get_batch_loss_metrics(PlainHead(table, rows), pair_columns(found))
    assert_equal(found.ours(), total, table, metrics)


@pytest.mark.parametrize("loss_type", ["sigmoid", "smoothed", "hinge", "ipo"])
@few
@given(drawn=drawn_pairs, seed=seeds, scale=scales, beta=betas, alpha=st.sampled_from((0.0, 0.5, 1.0)))
def test_cpo_is_trls(loss_type, drawn, seed, scale, beta, alpha):
    from trl.experimental.cpo import CPOTrainer

    share, name = (0.1, "sigmoid") if loss_type == "smoothed" else (0.0, loss_type)
    loss = CpoLoss(Cpo(loss_type=name, beta=beta, cpo_alpha=alpha, label_smoothing=share))
    trainer = made(CPOTrainer, alpha=0.0, loss_type=name, beta=beta, cpo_alpha=alpha, label_smoothing=share,
                   is_encoder_decoder=False, pad_token_id=0)  # fmt: skip
    assert_pairs_are_trls(trainer, pairs_for(loss, drawn, seed, scale))


@few
@given(drawn=drawn_pairs, seed=seeds, scale=scales, beta=betas, gamma=st.sampled_from((0.0, 0.5, 3.0)),
       share=st.sampled_from((0.0, 0.1)), shape=st.sampled_from((0.0, 0.25, -0.5)), likelihood=st.sampled_from((0.0, 1.0)))  # fmt: skip
def test_simpo_is_trls(drawn, seed, scale, beta, gamma, share, shape, likelihood):
    from trl.experimental.cpo import CPOTrainer

    options = Simpo(beta=beta, gamma=gamma, label_smoothing=share, alpha=shape, cpo_alpha=likelihood)
    trainer = made(CPOTrainer, alpha=shape, loss_type="simpo", simpo_gamma=gamma, beta=beta, cpo_alpha=likelihood,
                   label_smoothing=share, is_encoder_decoder=False, pad_token_id=0)  # fmt: skip
    assert_pairs_are_trls(trainer, pairs_for(SimpoLoss(options), drawn, seed, scale))


class Exact(torch.Tensor):
    """Float64 that stays so where TRL rounds its log-probabilities to float32."""

    def float(self):
        return self.as_subclass(torch.Tensor)


def orpo_trainer(beta):
    from trl.experimental.orpo import ORPOTrainer

    trainer = made(ORPOTrainer, is_encoder_decoder=False, padding_value=0, beta=beta)
    trainer.odds_ratio_loss = lambda *sides: ORPOTrainer.odds_ratio_loss(
        trainer, *(side.as_subclass(Exact) for side in sides)
    )
    return trainer


@few
@given(drawn=drawn_pairs, seed=seeds, scale=st.sampled_from((0.01, 1.0)), beta=betas)
def test_orpo_over_prompt_and_answer_is_trls(drawn, seed, scale, beta):
    found = pairs_for(OrpoLoss(Orpo(beta=beta, nll_scope="full")), drawn, seed, scale)
    assert_pairs_are_trls(orpo_trainer(beta), found)


@few
@given(drawn=drawn_pairs, seed=seeds, beta=betas)
def test_orpo_over_the_answer_differs_by_the_likelihood_alone(drawn, seed, beta):
    found = pairs_for(OrpoLoss(Orpo(beta=beta)), drawn, seed, 1.0)
    rows = together([found.padded("chosen"), found.padded("rejected")])
    given, (ours, _, _) = pair_columns(found), found.ours()
    total, theirs = orpo_trainer(beta).get_batch_loss_metrics(PlainHead(found.logits, rows), given)
    chosen = found.padded("chosen")
    logprobs = found.logits[chosen.places].log_softmax(-1)[:, :-1].gather(-1, chosen.ids[:, 1:, None]).squeeze(-1)
    answers = -logprobs[chosen.answers[:, 1:] > 0].mean()
    assert ours == pytest.approx(float(total) - theirs["nll_loss"] + float(answers), rel=1e-9)


judged = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.booleans()), min_size=2, max_size=5)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@few
@given(drawn=judged, seed=seeds, scale=scales, beta=betas, weights=st.sampled_from(((1.0, 1.0), (1.5, 0.5))))
def test_losses_of_judged_answers_are_trls(loss_type, drawn, seed, scale, beta, weights):
    from trl import KTOTrainer

    chance = torch.Generator().manual_seed(seed + 1)
    units = [DrawnUnit(documents={"text": document(p, a, chance)}, columns={"label": good}) for p, a, good in drawn]
    cls, loss = (Kto, KtoLoss) if loss_type == "kto" else (ApoZeroUnpaired, ApoZeroUnpairedLoss)
    options = cls(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    found = Drawn(loss(options), units, seed, scale)
    text = found.padded("text")
    sides = [found.padded("mismatched"), text] if loss_type == "kto" else [text]
    table = found.logits.clone().requires_grad_(True)
    model, recorded = InTurn(table, sides), {mode: defaultdict(list) for mode in ("train", "eval")}
    trainer = made(
        KTOTrainer, model=model, ref_model=InTurn(found.logits.roll(1, -1), sides), calculate_KL=loss_type == "kto",
        precompute_ref_logps=False, loss_type=loss_type, beta=beta, desirable_weight=weights[0],
        undesirable_weight=weights[1], args=SimpleNamespace(gradient_checkpointing_kwargs=None, device="cpu"),
        _total_train_tokens=0, _tp_size=1, _metrics=recorded, accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
    )  # fmt: skip
    given = {
        "input_ids": text.ids, "attention_mask": text.mask, "completion_mask": text.answers,
        "label": torch.tensor([good for _, _, good in drawn]),
    }  # fmt: skip
    for name, side in (("KL", sides[0]),) if loss_type == "kto" else ():
        given |= {
            f"{name}_input_ids": side.ids,
            f"{name}_attention_mask": side.mask,
            f"{name}_completion_mask": side.answers,
        }
    total = trainer._compute_loss(model, given, return_outputs=False)
    theirs = {name: values[-1] for name, values in recorded["train"].items()}
    if loss_type != "kto":
        theirs = {name: value for name, value in theirs.items() if name not in ("kl", "rewards/margins")}
    assert_equal(found.ours(), total, table, theirs)
