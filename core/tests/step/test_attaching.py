"""What an adapter may count on when it is attached: where it is, what it draws, what it logs, what it is given."""

import contextlib
import json

import attrs
import luthier
import pytest
import torch
from luthier.testing.ranks import in_ranks
from safetensors.torch import load_file, save_file
from torch import nn


class Shifted(nn.Module):
    """The layer's output and a trained number for each output, drawn at the start."""

    def __init__(self, layer, device):
        super().__init__()
        self.layer, self.on = layer, True
        self.shift = nn.Parameter(torch.randn(layer.out_features, device=device) * 1e-3)

    def forward(self, states):
        return self.layer(states) + self.shift.to(states.dtype) * self.on


class SharedList(list):
    """A list that copies of a part share: a rehearsal works on a copy."""

    def __deepcopy__(self, memo):
        return self


class SharedDict(dict):
    """The same for names and values."""

    def __deepcopy__(self, memo):
        return self


@attrs.define
class ShiftAdapter:
    """An adapter by the book, which remembers each context it was given."""

    contexts: list = attrs.field(factory=SharedList)
    layers: dict = attrs.field(factory=dict)

    def attach(self, model, context):
        self.contexts.append(context)
        model.requires_grad_(False)
        for name, layer in list(model.named_modules()):
            if name.endswith(("q_proj", "down_proj")):
                self.layers[name] = Shifted(layer, context.device)
                model.set_submodule(name, self.layers[name])
        context.log("layers", float(len(self.layers)))
        return model

    def groups(self):
        names = [f"{name}.shift" for name in self.layers]
        return [luthier.Group(parameters=[layer.shift for layer in self.layers.values()], names=names, role="adapter")]

    @contextlib.contextmanager
    def disabled(self):
        for layer in self.layers.values():
            layer.on = False
        yield
        for layer in self.layers.values():
            layer.on = True

    def state(self):
        return {name: layer.shift.detach() for name, layer in self.layers.items()}

    @torch.no_grad()
    def load_state(self, state):
        for name, layer in self.layers.items():
            layer.shift.copy_(state[name])

    def save(self, folder):
        save_file({name: shift.contiguous() for name, shift in self.state().items()}, folder / "shift.safetensors")

    def load(self, folder):
        self.load_state(load_file(folder / "shift.safetensors"))

    def penalty(self):
        return sum(layer.shift.square().sum() for layer in self.layers.values())


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_attach_in_a_run_is_told_that_it_trains_and_that_weights_have_values(train):
    adapter = ShiftAdapter()
    run = train(adapter=adapter, max_steps=1)
    (context,) = [c for c in adapter.contexts if c.purpose == "train"]
    assert context.has_values
    assert context.device == next(run.model.parameters()).device


def test_attach_in_a_plan_is_told_that_weights_have_no_values(model_folder, rows):
    adapter = ShiftAdapter()
    luthier.plan(model=str(model_folder), data=rows, adapter=adapter)
    assert {(context.purpose, context.has_values) for context in adapter.contexts} == {("plan", False)}


def test_what_an_adapter_draws_follows_from_the_seed_alone(train, tmp_path):
    def drawn(name, seed):
        torch.manual_seed(hash(name) % 1000)
        return train(adapter=ShiftAdapter(), max_steps=2, seed=seed, output_dir=tmp_path / name).loss_history

    first = drawn("a", 0)
    assert drawn("b", 0) == first
    assert drawn("c", 1) != first


def test_a_logged_number_belongs_to_its_step_alone(train, tmp_path):
    train(adapter=ShiftAdapter(), max_steps=3)
    assert ["layers" in line for line in lines(tmp_path / "run") if "loss" in line] == [True, False, False]


def test_the_penalty_is_shown_on_its_own(train, tmp_path):
    train(adapter=ShiftAdapter(), max_steps=2)
    assert all(line["penalty"] > 0 for line in lines(tmp_path / "run") if "loss" in line)


def test_as_many_batches_are_given_as_were_asked_for_while_the_data_lasts(train):
    adapter = ShiftAdapter()
    train(adapter=adapter, max_steps=1, max_tokens_per_device=64)
    (context,) = adapter.contexts[-1:]
    assert len(context.batches(2)) == 2
    assert len(context.batches(3)) == 3
    everything = context.batches(1000)
    assert sum(batch.num_units for batch in everything) == 24


def sharded_losses(settings):
    return luthier.train(**settings, adapter=ShiftAdapter(), distributed={"strategy": "fsdp"}).loss_history


def test_an_adapter_by_the_book_trains_on_two_sharded_ranks(model_folder, rows, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(model_folder), "data": str(data), "global_batch_size": 8, "max_steps": 3}
    settings |= {"exact_callbacks": ["jsonl"], "learning_rate": 1e-2, "memory_check": False}
    alone = luthier.train(**settings, adapter=ShiftAdapter(), output_dir=str(tmp_path / "alone"))
    ranks = in_ranks(2, sharded_losses, {**settings, "output_dir": str(tmp_path / "both")})
    for losses in ranks:
        assert losses == pytest.approx(alone.loss_history, rel=1e-4)


@attrs.define
class FrozenAdapter(ShiftAdapter):
    """It holds a large frozen tensor, and doubles what it has trained at the end of its task."""

    frozen: torch.Tensor | None = None
    tasks: list = attrs.field(factory=list)

    def begin_task(self, index, total):
        self.tasks.append(("begin", index, total))
        self.frozen = torch.randn(64, 64)

    def constants(self):
        return {"frozen": self.frozen}

    def load_constants(self, constants):
        self.frozen = constants["frozen"]

    @torch.no_grad()
    def end_task(self, index, total):
        self.tasks.append(("end", index, total))
        for layer in self.layers.values():
            layer.shift.mul_(2)


class Halt:
    """A callback that interrupts the run before a step."""

    def __init__(self, at):
        self.at = at

    @luthier.event
    def step_started(self, step):
        if step == self.at:
            raise KeyboardInterrupt


def interrupted(train, at, **settings):
    with pytest.raises(KeyboardInterrupt):
        train(exact_callbacks=["jsonl", Halt(at)], **settings)


def test_constants_are_written_once_named_by_their_content_and_listed_in_each_manifest(train, tmp_path):
    train(adapter=FrozenAdapter(), max_steps=4, save_steps=2)
    (file,) = (tmp_path / "run/constants").iterdir()
    for folder in (tmp_path / "run/checkpoints").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["constants"] == [file.name]
        assert not any(
            value.shape == (64, 64) for path in folder.glob("*.safetensors") for value in load_file(path).values()
        )


def test_a_resumed_adapter_gets_its_constants_back(train):
    settings = {"max_steps": 4, "save_steps": 2, "async_save": False}
    first, second = FrozenAdapter(), FrozenAdapter()
    interrupted(train, 4, adapter=first, **settings)
    train(adapter=second, **settings)
    assert torch.equal(first.frozen, second.frozen)
    assert ("begin", 0, 1) not in second.tasks and ("end", 0, 1) in second.tasks


def test_a_run_from_anothers_checkpoint_copies_its_constants(train, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "async_save": False}
    interrupted(train, 4, adapter=FrozenAdapter(), **settings)
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    train(adapter=FrozenAdapter(), resume=checkpoint, output_dir=tmp_path / "other", **settings)
    assert {p.name for p in (tmp_path / "other/constants").iterdir()} == {
        p.name for p in (tmp_path / "run/constants").iterdir()
    }


def test_a_checkpoint_whose_constants_are_gone_is_corrupt(train, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "async_save": False}
    interrupted(train, 4, adapter=FrozenAdapter(), **settings)
    (file,) = (tmp_path / "run/constants").iterdir()
    file.unlink()
    with pytest.raises(luthier.LuthierError) as caught:
        train(adapter=FrozenAdapter(), **settings)
    assert caught.value.code == "checkpoint-corrupt"


def test_a_task_ends_after_the_best_weights_are_back_and_before_the_last_evaluation(train, rows):
    adapter = FrozenAdapter()
    run = train(
        adapter=adapter, max_steps=4, eval_steps=1, eval_data=rows[:4], load_best_model_at_end=True, save_steps=1
    )
    fresh = run.evaluate()
    assert run.eval_loss == pytest.approx(fresh["eval_loss"], rel=1e-6)
    saved = load_file(run.artifact / "shift.safetensors")
    assert all(torch.equal(adapter.layers[name].shift, value) for name, value in saved.items())


@attrs.define
class SavesNothing(ShiftAdapter):
    def save(self, folder):
        (folder / "note.txt").write_text("nothing")

    def load(self, folder):
        pass


def test_an_artifact_that_holds_nothing_is_refused_before_the_first_step(train):
    steps = []
    watch = luthier.on(step_started=lambda: steps.append(1))
    with pytest.raises(luthier.LuthierError) as caught:
        train(adapter=SavesNothing(), max_steps=2, exact_callbacks=[watch])
    assert caught.value.code == "artifact-uncarried"
    assert steps == []


def test_verification_leaves_the_live_model_as_it_is(train):
    adapter = ShiftAdapter()
    run = train(adapter=adapter, max_steps=2)
    parameters = {name: layer.shift for name, layer in adapter.layers.items()}
    assert all(run.model.get_submodule(name).shift is shift for name, shift in parameters.items())


@attrs.define
class Deciding(ShiftAdapter):
    """It decides a number by chance, looks at activations, and keeps a slow result in the cache."""

    seen: dict = attrs.field(factory=SharedDict)

    def attach(self, model, context):
        self.seen["decided"] = context.decide("tests.rank", lambda: float(torch.rand(())), bound=1.0)
        if context.has_values:
            (batch,) = context.batches(1)
            self.seen["states"] = context.forward(model, batch).shape
            advance = context.progress(2, "preparing")
            self.seen["cached"] = context.cache("tests " + str(context.config.hidden_size), self.compute)["ones"]
            advance(2)
        return super().attach(model, context)

    def compute(self):
        self.seen["computed"] = self.seen.get("computed", 0) + 1
        return {"ones": torch.ones(3)}


def test_what_a_part_decides_is_kept_for_the_resumed_run(train):
    settings = {"max_steps": 4, "save_steps": 2, "async_save": False}
    first, second = Deciding(), Deciding()
    interrupted(train, 4, adapter=first, **settings)
    torch.manual_seed(1)
    train(adapter=second, **settings)
    assert second.seen["decided"] == first.seen["decided"]


def test_the_body_is_looked_at_before_the_adapter_is_there(train):
    adapter = Deciding()
    run = train(adapter=adapter, max_steps=1)
    assert adapter.seen["states"][1] == run.model.config.hidden_size


def test_a_cached_preparation_is_computed_once(train, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    first, second = Deciding(), Deciding()
    train(adapter=first, max_steps=1, output_dir=tmp_path / "a")
    train(adapter=second, max_steps=1, output_dir=tmp_path / "b")
    assert (first.seen.get("computed"), second.seen.get("computed")) == (1, None)
    assert torch.equal(second.seen["cached"], torch.ones(3))


def test_a_plan_is_told_the_bound_of_what_cannot_be_decided_yet(model_folder, rows):
    adapter = Deciding()
    luthier.plan(model=str(model_folder), data=rows, adapter=adapter)
    assert adapter.seen["decided"] == 1.0


def sharded_decisions(settings):
    adapter = Deciding()
    luthier.train(**settings, adapter=adapter, distributed={"strategy": "fsdp"})
    return adapter.seen["decided"]


def test_every_sharded_rank_is_told_what_rank_0_decided(model_folder, rows, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(model_folder), "data": str(data), "global_batch_size": 8, "max_steps": 1}
    settings |= {"exact_callbacks": [], "memory_check": False, "output_dir": str(tmp_path / "both")}
    first, second = in_ranks(2, sharded_decisions, settings)
    assert first == second


@attrs.define
class DenseAdapter(ShiftAdapter):
    """It trains norms, and its artifact is the whole model, in bfloat16 or as the run wants it."""

    artifact = "model"
    save_dtype = "bfloat16"
    norms: dict = attrs.field(factory=dict)
    context: object = None

    def attach(self, model, context):
        model.requires_grad_(False)
        self.context, self.model = context, model
        self.norms = {n: p.requires_grad_(True) for n, p in model.named_parameters() if "norm" in n}
        return model

    model: object = None

    def groups(self):
        return [luthier.Group(parameters=list(self.norms.values()), names=list(self.norms), role="norm")]

    def state(self):
        return {name: parameter.detach() for name, parameter in self.norms.items()}

    @torch.no_grad()
    def load_state(self, state):
        for name, parameter in self.norms.items():
            parameter.copy_(state[name])

    def save(self, folder):
        self.context.save_model(self.model, folder)

    def load(self, folder):
        loaded = dict(self.context.load_model(folder, self.model).named_parameters())
        self.load_state({name: loaded[name] for name in self.norms})

    def penalty(self):
        return None


def test_a_dense_artifact_is_written_in_the_dtype_that_the_adapter_wishes_for_and_verified(train):
    run = train(adapter=DenseAdapter(), max_steps=2)
    assert run.artifact.name == "model"
    (file,) = run.artifact.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_the_recipes_own_dtype_of_files_wins_over_the_adapters_wish(train):
    run = train(adapter=DenseAdapter(), max_steps=2, save_dtype="float32")
    (file,) = run.artifact.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
