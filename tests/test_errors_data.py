"""Errors of rows, models and devices, met as a user would meet them."""

import gzip
import json
import os
import shutil
import signal

import luthier
import pytest
from luthier.data.formats.recognise_form import convert_row
from luthier.data.read.row import Row
from luthier.data.tokenise.examples_of_rows import Maker
from luthier.data.tokenise.workers import Workers, cut_chunks, forked
from luthier.recipe.schema import Data, Source
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from provoking import cases_of, chat_row, check_error, provokes, stop_run

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
    world.train(data=str(world.file("broken.jsonl", json.dumps(chat_row(1)) + "\n{broken\n")))


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
    world.rows.write_text(world.rows.read_text() + json.dumps({"messages": chat_row(1)["messages"][:1]}))
    world.train()


@provokes("data-unrendered", "rows.jsonl:1", "does not write the system message (messages[0])", "data.unrendered: warn")
def a_system_prompt_that_the_template_passes_over(world):
    messages = [{"role": "system", "content": "Be brief."}, *chat_row(1)["messages"]]
    template = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    rows = world.file("rows.jsonl", [{"messages": messages}])
    world.train(data={"train": str(rows), "chat_template": template})


@provokes("data-avoided", "bad.jsonl:1: label", "one to avoid", "columns: {label: ignore}")
def an_answer_to_be_avoided(world):
    world.train(data=str(world.file("bad.jsonl", [{"prompt": "1?", "completion": "3", "label": False}])))


@provokes("data-overlong", "rows.jsonl:1", "has 8 tokens, max_length is 4", "Raise max_length")
def a_row_that_is_too_long(world):
    world.train(data={"train": str(world.rows), "max_length": 4, "overlong": "error"})


@provokes("data-changed", "data.train", "rows", "--fresh")
def rows_that_changed_under_a_run(world):
    stop_run(world)
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


@provokes("file-damaged", "cut", "not fully covered", "Copy or download")
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
    world.train(model=model, tokenizer=tiny_tokenizer(), adapter="lora")


@provokes("model-target", "target_modules", "'q_prj'", "q_proj")
def a_misspelt_target(world):
    world.train(adapter={"name": "lora", "target_modules": ["q_prj"]})


@provokes("device-unavailable", "device", "'cuda:99'", "cpu")
def a_gpu_that_is_not_there(world):
    world.train(device="cuda:99")


@provokes("distributed-setup", "launch", "2 machines", "--rdzv-endpoint HOST:PORT")
def machines_without_a_meeting_place(world):
    return world.command("train", world.recipe(), "--nnodes", "2", "--nproc-per-node", "2")


@provokes("distributed-lost", "did not find each other", "Run the same command again")
def a_process_whose_others_never_come(world):
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        world.train(distributed={"timeout": 1.0})


@provokes("device-lost", "cpu", "it stopped answering at step 1", "No checkpoint")
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


@cases_of(__name__)
def test_the_error_says_where_what_and_what_to_do(world, code, act, fragments):
    check_error(world, code, act, fragments)
