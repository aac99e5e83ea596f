"""Out of memory: the step begins again with smaller micro-batches, and its gradient is the undisturbed one."""

import luthier
import pytest
import torch
from luthier.checkpoint import folder as checkpoint
from luthier.errors import LuthierError
from luthier.model.load import quiet
from luthier.plugins.contracts.values import LossOutput
from luthier.step.out_of_memory import is_exhausted

TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Exhausting:
    """A callback whose hook on one layer raises as an allocator does: `times` times, where a batch has `above` tokens.

    `backward` raises half-way through backward instead, when some gradients are there already.
    """

    def __init__(self, times=1000, above=0, backward=False, error=None):
        self.left, self.above, self.backward = times, above, backward
        self.error = error or torch.OutOfMemoryError(TEXT)
        self.seen = []  # tokens of each forward pass of the layer that trains

    def over(self, model):
        layer = model.model.layers[1].mlp if self.backward else model.model.layers[1]
        if self.backward:
            layer.register_full_backward_hook(lambda module, grads, outputs: self.raise_at(outputs[0].shape[-2]))
        layer.register_forward_pre_hook(lambda module, inputs: self.meet(inputs[0].shape[-2]))
        return model

    def meet(self, tokens):
        self.seen.append(tokens)
        if not self.backward and torch.is_grad_enabled():
            self.raise_at(tokens)

    def raise_at(self, tokens):
        if self.left and tokens > self.above:
            self.left -= 1
            raise self.error


class MeanOfSquares:
    """A loss that couples the batch: the squared mean of the documents' log-likelihoods."""

    data = "tokens"
    couples = "batch"

    def terms(self, batch):
        return {"square": float(batch.num_documents)}

    def scores(self, policy, batch):
        return batch.sum_by_document(policy.token_logprobs(batch)), {}

    def combine(self, scores, fixed):
        return LossOutput(sums={"square": (scores / 100).mean() ** 2 * len(scores)})

    def __call__(self, policy, batch):
        return self.combine(*self.scores(policy, batch))


@pytest.fixture
def exhausted(train, model_folder, tmp_path):
    """Train in float64 with a layer that runs out of memory; `run` and what was seen."""

    def run(trouble=None, **changes):
        import transformers

        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
        given = trouble.over(model) if trouble else model
        settings = {"model": (given, tokenizer), "optimizer": {"name": "sgd", "momentum": 0.9}, "max_steps": 3}
        return train(**{**settings, **changes})

    return run


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize("loss", ["sft", MeanOfSquares()], ids=["sft", "coupled"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_step_that_ran_out_of_memory_ends_at_the_undisturbed_weights(exhausted, tmp_path, loss, backward):
    whole = exhausted(loss=loss, output_dir=tmp_path / "whole")
    trouble = Exhausting(above=100, backward=backward)
    cut = exhausted(trouble, loss=loss, output_dir=tmp_path / "cut")
    assert trouble.left < 1000
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-10, atol=1e-10)
    assert cut.loss_history == pytest.approx(whole.loss_history, rel=1e-10)
    assert cut.samples_seen == whole.samples_seen == 24


class Margins:
    """-log sigmoid of the chosen answer's log-likelihood less the rejected one's."""

    data = "preference"

    def terms(self, batch):
        return {"margin": float(len(batch.pairs))}

    def __call__(self, policy, batch):
        assert len(batch.pairs) == batch.num_units  # no unit is divided
        answers = batch.sum_by_document(policy.token_logprobs(batch))
        margins = answers[batch.pairs[:, 0]] - answers[batch.pairs[:, 1]]
        return LossOutput(sums={"margin": -torch.nn.functional.logsigmoid(margins / 10).sum()})


def test_a_step_of_pairs_is_divided_between_pairs(exhausted, tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": f"{i} " * (2 + i % 3), "rejected": "no one"} for i in range(24)]
    whole = exhausted(loss=Margins(), data=rows, output_dir=tmp_path / "whole")
    trouble = Exhausting(above=60)
    cut = exhausted(trouble, loss=Margins(), data=rows, output_dir=tmp_path / "cut")
    assert trouble.left < 1000
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-10, atol=1e-10)
    assert cut.loss_history == pytest.approx(whole.loss_history, rel=1e-10)


def test_the_limit_is_halved_until_it_fits_and_kept_for_the_rest_of_the_run(exhausted):
    trouble = Exhausting(above=60)
    run = exhausted(trouble)
    trained = [tokens for tokens in trouble.seen if tokens > 31]  # more than the probe's
    assert trained[0] > 120  # the whole global batch, as memory allowed at first
    failures = [tokens for tokens in trouble.seen if tokens > 60]
    assert failures[1] <= failures[0] // 2 + 30
    assert max(trouble.seen[trouble.seen.index(failures[-1]) + 1 :]) <= 60
    assert run.steps == 3


def test_what_is_said_names_the_tokens_the_new_limit_and_the_cause(exhausted, tmp_path):
    exhausted(Exhausting(times=1), output_dir=tmp_path / "run")
    log = (tmp_path / "run" / "log.jsonl").read_text()
    line = next(line for line in log.splitlines() if "out of memory" in line)
    assert '"limit":' in line
    assert "unchanged" in line
    assert TEXT in line


def test_with_one_example_in_each_micro_batch_there_are_three_more_tries(exhausted, tmp_path):
    trouble = Exhausting(times=3)
    exhausted(trouble, packing=False)
    assert trouble.left == 0
    with pytest.raises(LuthierError) as caught:
        exhausted(Exhausting(times=4), packing=False, output_dir=tmp_path / "other")
    assert caught.value.code == "memory-exhausted"


def test_the_error_at_the_end_has_the_numbers_and_what_to_change(exhausted):
    with pytest.raises(LuthierError) as caught:
        exhausted(Exhausting())
    text = str(caught.value)
    assert caught.value.code == "memory-exhausted"
    assert "3 times again" in text
    assert TEXT.splitlines()[0] in text
    assert "are free now" in text
    assert "gradient_checkpointing: true" in text


def test_without_recovery_the_first_failure_ends_the_run(exhausted):
    trouble = Exhausting(times=2)
    with pytest.raises(LuthierError) as caught:
        exhausted(trouble, oom_recovery=False)
    assert caught.value.code == "memory-exhausted"
    assert trouble.left == 1


def test_an_error_of_another_kind_is_not_taken_for_exhausted_memory(exhausted):
    trouble = Exhausting(times=1, error=RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        exhausted(trouble)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(TEXT),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_way_to_say_that_memory_ran_out_is_known(error):
    assert is_exhausted(error)


def test_a_real_allocation_that_no_machine_can_serve_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_exhausted(caught.value)


def test_a_resumed_run_keeps_the_limit_that_was_learnt(exhausted, tmp_path):
    def breaks(step):
        if step == 2:
            raise ValueError("the power went")

    settings = {"output_dir": tmp_path / "run", "save_steps": 1, "async_save": False}
    with pytest.raises(ValueError, match="the power went"):
        exhausted(Exhausting(above=60), **settings, exact_callbacks=[luthier.on(step_ended=breaks)])
    _, tree, _ = checkpoint.newest_checkpoint(tmp_path / "run")
    assert 0 < tree["tally"]["token_limit"] <= 60
    again = Exhausting(times=0)
    run = exhausted(again, **settings, exact_callbacks=[])
    assert run.steps == 3
    assert max(again.seen) <= 60
