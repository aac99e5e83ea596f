"""Every error code is met as a user would meet it: the place, what was found, what to do; and its exit status."""

import gzip
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import luthier
import pytest
from luthier import AdapterRecord, LuthierError, Recipe
from luthier.builtin import GpuSafety
from luthier.builtin.gpu_safety import Guardian, Reading
from luthier.cli.app import app
from luthier.data.formats.recognise_form import convert_row
from luthier.data.read.row import Row
from luthier.data.tokenise.examples_of_rows import Maker
from luthier.data.tokenise.workers import Workers, cut_chunks, forked
from luthier.errors import CODES
from luthier.plugins.registry import Plugins, installed_plugins
from luthier.recipe.schema import Data, Source
from luthier.runs.writing.lock import locked_folder
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
OFFER = """
import attrs
from luthier import CallbackRecord, hookimpl

@attrs.frozen(kw_only=True)
class Options:
    pass

@hookimpl
def luthier_callbacks():
    return [CallbackRecord(name="{name}", summary="Made up.", options=Options, build="{module}:{attribute}")]
"""
WATCHERS = """
import os, signal
import luthier

def failing(options):
    def end():
        raise RuntimeError("a defect")
    return luthier.on(step_ended=end)

def terminating(options):
    def end():
        os.kill(os.getpid(), signal.SIGTERM)
    return luthier.on(step_ended=end)
"""


class World:
    """A folder with a tiny model and rows, runs on them, the command line, and distributions made on the spot."""

    def __init__(self, folder, model, path):
        self.folder, self.model, self._path = folder, model, path
        self.rows = self.file("rows.jsonl", [_row(i) for i in range(16)])
        self.settings = {"model": str(model), "data": str(self.rows), "adapter": "lora", "exact_callbacks": ["jsonl"],
                         "global_batch_size": 8, "output_dir": folder / "run"}  # fmt: skip

    def train(self, **changes):
        return luthier.train(**{**self.settings, **changes})

    def file(self, name, content):
        """A file of text, bytes, or rows."""
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
        return path

    def recipe(self, **changes):
        return self.file(
            "recipe.json", json.dumps({**self.settings, "output_dir": str(self.folder / "run"), **changes})
        )

    def command(self, *words):
        """The error that the command prints as JSON; its exit status is the code's."""
        installed_plugins.cache_clear()
        result = CliRunner().invoke(app, [str(w) for w in (*words, "--json")])
        told = json.loads(result.stdout)["error"]
        assert result.exit_code == (143 if told["code"] == "interrupted" else CODES[told["code"]].exit_status)
        return told

    def distribution(self, name, source):
        """An installed distribution, of which one module is the plugin."""
        site, module = self.folder / "site", name.replace("-", "_")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[luthier]\n{name.removeprefix('luthier-')} = {module}\n")
        self._path.syspath_prepend(str(site))

    def watcher(self, attribute):
        """A callback `made-up` of the command line's."""
        self.distribution("luthier-made-up", OFFER.format(name="made-up", module="watchers", attribute=attribute))
        (self.folder / "site/watchers.py").write_text(WATCHERS)


def _row(number):
    question = {"role": "user", "content": f"{number}?"}
    return {"messages": [question, {"role": "assistant", "content": str(number + 1)}]}


@pytest.fixture
def world(tmp_path, model_folder, monkeypatch):
    yield World(tmp_path, model_folder, monkeypatch)
    installed_plugins.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("luthier_made", "luthier_other", "watchers"))]:
        del sys.modules[name]


PROVOKED = {}


def provokes(code, *fragments):
    """Marks what provokes a code; the message must hold the fragments, in this order."""

    def mark(function):
        PROVOKED.setdefault(code, []).append((function, fragments))
        return function

    return mark


# the command line


@provokes("usage", "Missing argument", "See `luthier generate --help`")
def generate_without_words(world):
    return world.command("generate")


@provokes("interrupted", "SIGTERM", "after step 1", "the same command goes on")
def terminated(world):
    world.watcher("terminating")
    return world.command("train", world.recipe(exact_callbacks=["jsonl", "made-up"]))


@provokes("internal", "RuntimeError: a defect", "report")
def a_defect_of_a_callback(world):
    world.watcher("failing")
    return world.command("train", world.recipe(exact_callbacks=["made-up"]))


@provokes("path-unwritable", "rows.jsonl/run", "a file stands where a folder must be", "Choose another path")
def an_output_folder_under_a_file(world):
    world.train(output_dir=world.rows / "run")


@provokes("path-unwritable", "rows.jsonl/saved", "a file stands where a folder must be")
def an_artifact_under_a_file(world):
    world.train().save(world.rows / "saved")


@provokes("path-unwritable", "rows.jsonl/log", "a file stands where a folder must be")
def a_log_under_a_file(world):
    return world.command("train", world.recipe(), "--log-file", world.rows / "log")


# recipes


@provokes("recipe-not-found", "recipe.yml", "no such file", "Did you mean 'recipe.json'?")
def a_recipe_that_is_not_there(world):
    world.recipe()
    return world.command("train", world.folder / "recipe.yml")


@provokes("recipe-syntax", "r.yaml:2", "expected ',' or ']'")
def a_recipe_with_an_open_bracket(world):
    luthier.train(world.file("r.yaml", "adapter: [lora\nmodel: demo\n"))


@provokes("recipe-unknown-option", "r.yaml:4: adapter.rang", "adapter 'lora' has no such option", "r")
def an_option_that_lora_has_not(world):
    text = "model: demo\ndata: rows.jsonl\nadapter: {name: lora,\n  rang: 3}\n"
    luthier.train(world.file("r.yaml", text))


@provokes("recipe-unknown-option", "learning_rat", "Did you mean 'learning_rate'?")
def a_misspelt_setting(world):
    world.train(learning_rat=1e-3)


@provokes("recipe-wrong-type", "--adapter.r", "expected int", "'four'")
def a_rank_in_words(world):
    return world.command("train", world.recipe(), "--adapter.r", "four")


@provokes("recipe-out-of-range", "adapter.r", "found 0", "at least 1")
def a_rank_of_zero(world):
    world.train(adapter={"name": "lora", "r": 0})


@provokes("recipe-missing", "model", "required", "by flag")
def no_model(world):
    return world.command("train", "--data", world.rows)


@provokes("recipe-missing", "model: a loaded model comes with its tokenizer", "tokenizer=")
def a_model_without_its_tokenizer(world):
    world.train(model=tiny_model())


@provokes("recipe-conflict", "batch_size", "two readings", "global_batch_size")
def the_batch_size_alone(world):
    world.train(batch_size=8)


@provokes("recipe-conflict", "early_stopping.metric", "no validation rows", "Set data.validation")
def early_stopping_without_evaluations(world):
    world.train(exact_callbacks=["early_stopping"])


# parts and plugins


@provokes("part-unknown", "adapter", "'lara'", "Did you mean 'lora'?")
def a_misspelt_adapter(world):
    world.train(adapter="lara")


@provokes("part-broken", "'made-up'", "luthier-made-up 1.0", "ZeroDivisionError", "Repair or reinstall")
def a_plugin_that_does_not_load(world):
    world.distribution("luthier-made-up", "1 / 0")
    Recipe.from_dict({**world.settings, "exact_callbacks": ["made-up"]}, plugins=Plugins())


@provokes("part-ambiguous", "callback 'made-up'", "luthier-made-up 1.0", "luthier-other 1.0", "LUTHIER_DISABLE_PLUGINS")
def a_name_that_two_distributions_claim(world):
    for name in ("luthier-made-up", "luthier-other"):
        world.distribution(name, OFFER.format(name="made-up", module="watchers", attribute="failing"))
    Recipe.from_dict({**world.settings, "exact_callbacks": ["made-up"]}, plugins=Plugins())


@provokes("part-incompatible", "adapter 'full' needs dense-weights", "quantizer 'int8'", "Replace one")
def full_tuning_of_integers(world):
    world.train(adapter="full", quantizer="int8")


@provokes("part-invalid", "loss", "no __call__")
def a_loss_that_is_none(world):
    class Half:
        data = "tokens"

        def terms(self, batch):
            return {}

    world.train(loss=Half())


@provokes("part-invalid", "loss", "LossOutput")
def a_loss_that_gives_a_mean(world):
    class Mean:
        data = "tokens"

        def terms(self, batch):
            return {"mean": 1.0}

        def __call__(self, policy, batch):
            return policy.token_logprobs(batch).mean()

    world.train(loss=Mean())


@provokes("part-unsupported", "carries an adapter already", "load the model again")
def a_model_that_is_adapted_twice(world):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for name in ("first", "second"):
        world.train(model=model, tokenizer=tokenizer, output_dir=world.folder / name)


@provokes("plugin-invalid", "Not A Name")
def a_record_with_a_name_that_nobody_can_write(world):
    AdapterRecord(name="Not A Name", summary="Made up.", options="a:b", build="a:b")


@provokes("plugin-name", "'My_Plugin'", "Write 'my-plugin'.")
def a_plugin_in_capitals(world):
    return world.command("new-plugin", "My_Plugin", "--kind", "loss")


@provokes("dependency-missing", "callback 'wandb'", "wandb", "pip install")
def a_tracker_without_its_client(world):
    world._path.setitem(sys.modules, "wandb", None)
    for name in [name for name in sys.modules if name.startswith(("luthier_wandb.", "wandb."))]:
        world._path.delitem(sys.modules, name)
    world.train(exact_callbacks=["wandb"])


# data


@provokes("data-not-found", "row.jsonl", "no such file", "Did you mean 'rows.jsonl'?")
def a_misspelt_file(world):
    world.train(data=str(world.folder / "row.jsonl"))


@provokes("data-unreadable", "noise.jsonl:1", "binary", "NUL")
def a_binary_file(world):
    world.train(data=str(world.file("noise.jsonl", b"\x80\x81\x00\n")))


@provokes("data-unreadable", "cut.jsonl.gz", "damaged or cut short")
def an_archive_that_was_cut(world):
    packed = gzip.compress(world.rows.read_bytes())
    world.train(data=str(world.file("cut.jsonl.gz", packed[: len(packed) // 2])))


@provokes("data-row", "broken.jsonl:2", "not JSON", "'{broken'", "line")
def a_broken_row(world):
    world.train(data=str(world.file("broken.jsonl", json.dumps(_row(1)) + "\n{broken\n")))


@provokes("data-format", "strange.jsonl", "columns present: bar, foo", "columns: {prompt")
def rows_of_no_known_format(world):
    world.train(data=str(world.file("strange.jsonl", [{"foo": 1, "bar": 2}])))


@provokes("data-column", "qa.jsonl:1", "no column 'question'", "Did you mean 'questions'?")
def a_misspelt_column(world):
    path = world.file("qa.jsonl", [{"questions": "1?", "answer": "2"}])
    world.train(data={"train": [{"path": str(path), "columns": {"prompt": "question", "completion": "answer"}}]})


@provokes("data-empty", "empty.jsonl", "no rows")
def an_empty_file(world):
    world.train(data=str(world.file("empty.jsonl", "")))


@provokes("data-empty", "no row is left", "overlong: 16")
def rows_that_are_all_too_long(world):
    world.train(data={"train": str(world.rows), "max_length": 2})


@provokes("data-unsupervised", "rows.jsonl:17", "no supervised token", "data.unsupervised: drop")
def a_row_without_an_answer(world):
    world.rows.write_text(world.rows.read_text() + json.dumps({"messages": _row(1)["messages"][:1]}))
    world.train()


@provokes("data-unrendered", "rows.jsonl:1", "does not write the system message (messages[0])", "data.unrendered: warn")
def a_system_prompt_that_the_template_passes_over(world):
    messages = [{"role": "system", "content": "Be brief."}, *_row(1)["messages"]]
    template = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    rows = world.file("rows.jsonl", [{"messages": messages}])
    world.train(data={"train": str(rows), "chat_template": template})


@provokes("data-avoided", "bad.jsonl:1: label", "one to avoid", "columns: {label: ignore}")
def an_answer_to_be_avoided(world):
    world.train(data=str(world.file("bad.jsonl", [{"prompt": "1?", "completion": "3", "label": False}])))


@provokes("data-overlong", "rows.jsonl:1", "has 8 tokens, max_length is 4", "Raise max_length")
def a_row_that_is_too_long(world):
    world.train(data={"train": str(world.rows), "max_length": 4, "overlong": "error"})


@provokes("data-changed", "data.train", "other rows", "--fresh")
def rows_that_changed_under_a_run(world):
    _stopped(world)
    world.rows.write_text(world.rows.read_text().replace("7?", "8?"))
    world.train()


@provokes("template-missing", "rows.jsonl:1", "no chat template", "data.chat_template")
def conversations_for_a_tokenizer_without_a_template(world):
    world.train(model=tiny_model(), tokenizer=tiny_tokenizer(template=None))


@provokes("template-unprovable", "rows.jsonl:1", "cannot be trained on", "another one")
def a_template_that_leaves_the_answers_out(world):
    world.train(data={"train": str(world.rows), "chat_template": "{% for m in messages %}{{ m.role }}{% endfor %}"})


# models and devices


@provokes("model-not-found", "nowhere", "no such folder", "Check the folder")
def a_model_that_is_not_there(world):
    world.train(model=str(world.folder / "nowhere"))


@provokes("model-not-found", "cut", "not fully covered")
def a_model_whose_weights_were_cut(world):
    weights = shutil.copytree(world.model, world.folder / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    world.train(model=str(world.folder / "cut"))


@provokes("model-weights", "short", "lacks model.layers.2", "Check the sizes in the model's config.json")
def a_checkpoint_of_fewer_layers_than_its_config_has(world):
    folder = shutil.copytree(world.model, world.folder / "short")
    config = json.loads((folder / "config.json").read_text())
    config.update(num_hidden_layers=config["num_hidden_layers"] + 2, layer_types=None)
    (folder / "config.json").write_text(json.dumps(config))
    world.train(model=str(folder))


@provokes("model-vocabulary", "rows.jsonl:1", "not among the model's 20 embeddings", "own tokenizer")
def a_tokenizer_of_a_larger_model(world):
    world.train(model=tiny_model(vocab_size=20), tokenizer=tiny_tokenizer())


@provokes("model-architecture", "LlamaForCausalLM", "packed documents differ from separate ones", "Set packing: false.")
def a_model_whose_documents_see_each_other(world):
    model = tiny_model()
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + output.mean(1, keepdim=True)
    )
    world.train(model=model, tokenizer=tiny_tokenizer(), adapter="full")


@provokes("model-target", "target_modules", "'q_prj'", "q_proj")
def a_misspelt_target(world):
    world.train(adapter={"name": "lora", "target_modules": ["q_prj"]})


@provokes("device-unavailable", "device", "'cuda:99'", "cpu")
def a_gpu_that_is_not_there(world):
    world.train(device="cuda:99")


@provokes("distributed-setup", "launch", "2 machines have no place to meet", "--rdzv-endpoint HOST:PORT")
def machines_without_a_meeting_place(world):
    return world.command("train", world.recipe(), "--nnodes", "2", "--nproc-per-node", "2")


@provokes("distributed-lost", "did not find each other", "Run the same command again")
def a_process_whose_others_never_come(world):
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        world.train(distributed={"timeout": 1.0})


@provokes("device-lost", "cpu", "it stopped answering at step 1", "No checkpoint was written yet")
def a_device_that_vanishes(world):
    import torch

    def gone(step):
        raise torch.AcceleratorError("CUDA error: no CUDA-capable device is detected")

    world.train(exact_callbacks=[luthier.on(step_ended=gone)])


@provokes("memory-too-small", "device", "weights", "are free on cpu", "memory_check: false")
def a_model_larger_than_the_machine(world):
    folder = shutil.copytree(world.model, world.folder / "huge")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 2**37}))
    (folder / "model.safetensors").unlink()  # whose shapes would be told of first
    world.train(model=str(folder))


@provokes("memory-exhausted", "tokens", "are free now")
def a_micro_batch_that_does_not_fit(world):
    import torch

    def exhausted(*_):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = tiny_model()
    model.model.layers[1].register_forward_pre_hook(exhausted)
    world.train(model=model, tokenizer=tiny_tokenizer(), oom_recovery=False)


@provokes("data-worker", "rows[0] to rows[", "died twice (signal 9)")
def rows_that_kill_whoever_tokenises_them(world):
    def start(others):
        hand = forked(maker, others)
        os.kill(hand.process.pid, signal.SIGKILL)
        return hand

    maker = Maker.of(Data(train=[Source(path="rows")]), tiny_tokenizer())
    forms = [convert_row(Row({"prompt": "a", "completion": "b"}, f"rows[{i}]"), "prompt_completion") for i in range(3)]
    with Workers(maker, 2, start) as workers:
        list(workers.made(cut_chunks(forms)))


@provokes("compile-failed", "torch_compile")
def a_kernel_that_cannot_be_compiled(world):
    import torch
    from luthier.runs.writing.decisions import Decisions
    from luthier.step.compile_step import Passes

    def formula(x):
        torch._dynamo.graph_break()
        return x

    Passes(strict=True, decisions=Decisions())._run(formula, (torch.zeros(2),), lambda: None)


OPERATION = """
from luthier import OperationRecord, hookimpl


@hookimpl
def luthier_operations():
    return [OperationRecord(name="made-up", summary="Half a norm.", operation="rms_norm", build="halves:build",
                            predicate="halves:fits", priority=3)]
"""
HALVES = """
def build(options):
    return norm


def fits(device, dtype, shape):
    return True


def norm(x, weight, eps, offset, rounded, dtype):
    return x * weight * {factor}
"""


@provokes("operation-differs", "operation made-up (luthier-made-up 1.0)", "rms_norm's reference", "kernels: reference")
def an_operation_that_gives_other_numbers(world):
    world.distribution("luthier-made-up", OPERATION)
    (world.folder / "site/halves.py").write_text(HALVES.format(factor="0.5"))
    return world.command("train", world.recipe())


@provokes("operation-failed", "operation made-up", "kernels: require", "kernels: auto")
def an_operation_that_is_required_and_raises(world):
    world.distribution("luthier-made-up", OPERATION.replace("halves", "nothing"))
    (world.folder / "site/nothing.py").write_text(HALVES.format(factor="None"))
    return world.command("train", world.recipe(kernels="require"))


# runs


def _stopped(world, **changes):
    """A run with a checkpoint of its first step, in the output folder."""
    with pytest.raises(Exception, match="SIGTERM"):
        world.train(
            exact_callbacks=["jsonl", luthier.on(step_ended=lambda: os.kill(os.getpid(), signal.SIGTERM))], **changes
        )
    return world.folder / "run"


@provokes("device-unsafe", "gpu_safety", "a GPU is at 99 °C; the limit is 95", "Let it cool")
def a_gpu_that_is_too_hot(world):
    class Sensor:  # this machine need not have one
        def ask(self):
            pass

        def answer(self, *, wait=False):
            return [Reading(uuid="GPU-a", temperature=99.0, power=300.0)]

    world.train(exact_callbacks=[Guardian(GpuSafety(), sensor=Sensor(), sleep=lambda seconds: None)])


@provokes("run-folder-other", "run", "of another recipe", "learning_rate was 0.0002, is 0.001", "--fresh")
def another_recipe_in_the_folder_of_a_run(world):
    _stopped(world)
    world.train(learning_rate=1e-3)


@provokes("run-folder-other", "run", "thesis.tex")
def a_folder_of_other_files(world):
    (world.folder / "run").mkdir()
    world.file("run/thesis.tex", "mine")
    world.train()


@provokes("run-folder-locked", "run", f"held by pid {os.getpid()}", "Wait")
def a_folder_in_which_another_process_trains(world):
    with locked_folder(world.folder / "run"):
        return world.command("train", world.recipe())


@provokes("run-not-found", "step-00000007", "no checkpoint here", "run/checkpoints/step-")
def a_checkpoint_that_is_not_there(world):
    world.train(resume=world.folder / "run/checkpoints/step-00000007")


@provokes("run-not-found", "run.json is damaged")
def a_damaged_record(world):
    (_stopped(world) / "run.json").write_text("{")
    luthier.generate(world.folder / "run", "1?")


@provokes("run-ambiguous", "'ru' may be", "run-2", "Write more of the id")
def a_name_that_several_runs_have(world):
    world.train()
    world.train(fresh=True)
    return world.command("runs", "show", "ru", "--dir", world.folder)


@provokes("run-not-running", "run", "the run is stopped, and nobody trains here", "the command that began it")
def a_checkpoint_of_a_run_that_does_not_train(world):
    return world.command("checkpoint", _stopped(world))


@provokes("run-silent", "run", "no checkpoint within 0.01 seconds", "--timeout")
def a_run_that_never_ends_its_step(world):
    with locked_folder(_stopped(world)):
        return world.command("checkpoint", world.folder / "run", "--timeout", "0.01")


@provokes("disk-full", "checkpoint of step 2 not written", "Free space")
def a_disk_without_room(world):
    return _in_child(world.train, largest_file=12_000)


def _in_child(act, largest_file):
    """The error of `act` in a forked process in which no file can grow beyond some bytes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            act()
        except LuthierError as error:
            os.write(write, json.dumps(error.to_dict()).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as told:
        return json.loads(told.read())


@provokes("format-newer", "step-00000001", "written by luthier 12.0, in format 99", "Use luthier 12.0 or newer")
def a_checkpoint_of_a_newer_luthier(world):
    manifest = _stopped(world) / "checkpoints/step-00000001/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99, "luthier": "12.0"}))
    world.train()


@provokes("checkpoint-corrupt", "step-00000001", "state.safetensors is damaged, and no other is whole", "--fresh")
def a_damaged_checkpoint(world):
    state = _stopped(world) / "checkpoints/step-00000001/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    world.train()


@provokes("checkpoint-other", "step-00000001", "optimizer was 'adamw', is 'sgd'", "--allow-changed parts")
def a_checkpoint_of_another_optimizer(world):
    checkpoint = _stopped(world) / "checkpoints/step-00000001"
    world.train(output_dir=str(world.folder / "other"), resume=checkpoint, optimizer="sgd")


@provokes("checkpoint-state", "Keeper/thing", "object is neither tensor nor JSON", "author")
def a_part_whose_state_cannot_be_stored(world):
    class Keeper:
        @luthier.event
        def step_ended(self):
            """It watches."""

        def state(self):
            return {"thing": object()}

        def load_state(self, state):
            """Nothing comes back."""

    world.train(exact_callbacks=[Keeper()])


@provokes("train-nonfinite", "loss nan", "at step 2", "Lower the learning rate")
def a_learning_rate_beyond_all_measure(world):
    world.train(learning_rate=1e30)


@provokes("train-nothing", "target_modules", "targets")
def an_adapter_without_targets(world):
    world.train(adapter={"name": "lora", "target_modules": []})


# artifacts


@provokes("artifact-mismatch", "adapter_model.safetensors", "lacks 1 tensors", "q_proj")
def an_adapter_that_lost_a_tensor(world):
    from safetensors.torch import load_file, save_file

    path = world.train().artifact / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "q_proj" in name))
    save_file(tensors, path)
    luthier.generate(world.folder / "run", "1?")


@provokes("artifact-mismatch", "luthier.json", "damaged", "Copy the file again")
def an_adapter_whose_note_is_damaged(world):
    (world.train().artifact / "luthier.json").write_text("{")
    luthier.generate(world.folder / "run", "1?")


@provokes("artifact-dtype", "save_dtype", "embed_tokens.weight holds 1e+06, which float16 cannot", "bfloat16")
def a_weight_too_large_for_the_files(world):
    model = tiny_model()
    model.model.embed_tokens.weight.data[-1] = 1e6  # of a token that no row has
    world.train(model=model, tokenizer=tiny_tokenizer(), adapter="full", save_dtype="float16")


@provokes("artifact-unmergeable", "no adapter to merge", "Give a run's folder")
def a_model_without_an_adapter(world):
    return world.command("merge", world.model)


@provokes("artifact-not-found", "no artifact and no checkpoint yet", "finish it")
def a_run_that_is_not_finished(world):
    shutil.rmtree(_stopped(world) / "checkpoints")
    luthier.generate(world.folder / "run", "1?")


@provokes("artifact-not-found", "without luthier.json", "load it with peft")
def an_adapter_of_plain_peft(world):
    artifact = world.train().artifact
    (artifact / "luthier.json").unlink()
    luthier.merge(artifact)


CASES = [(code, act, fragments) for code, acts in PROVOKED.items() for act, fragments in acts]


def asserted_with_jobs():
    """The codes that the tests of jobs and providers name, each of which needs a service to be provoked."""
    tests = [*(ROOT / "core/tests/jobs").glob("*.py"), ROOT / "core/tests/cli/test_jobs.py"]
    tests += (ROOT / "plugins").glob("*/tests/*.py")
    text = "\n".join(path.read_text("utf-8") for path in tests)
    return {code for code in CODES if f'"{code}"' in text}


def test_every_code_is_provoked():
    assert PROVOKED.keys() <= CODES.keys()
    assert CODES.keys() - PROVOKED.keys() - asserted_with_jobs() == set()


@pytest.mark.parametrize(("code", "act", "fragments"), CASES, ids=[act.__name__ for _, act, _ in CASES])
def test_the_error_says_where_what_and_what_to_do(world, code, act, fragments):
    told = _told(act, world)
    assert told["code"] == code, told
    rest = told["message"]
    for fragment in fragments:
        assert fragment in rest, told["message"]
        rest = rest.partition(fragment)[2]
    assert told["remedy"]
    assert told["message"].endswith(f"[{code}]")
    assert told.keys() == {"code", "message", "problem", "where", "found", "remedy"}


def _told(act, world):
    """The error as plain data: raised, or printed by a command."""
    try:
        return act(world)
    except LuthierError as error:
        return error.to_dict()
