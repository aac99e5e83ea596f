"""Errors of runs, checkpoints and artifacts, met as a user would meet them."""

import json
import os
import resource
import shutil
import signal

import luthier
from luthier import LuthierError
from luthier.builtin import GpuSafety
from luthier.builtin.full import FullTuning
from luthier.builtin.gpu_safety import Guardian, Reading
from luthier.plugins.records import NoOptions
from luthier.runs.writing.lock import locked_folder
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from provoking import cases_of, check_error, provokes, stop_run

# runs


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
    stop_run(world)
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
    (stop_run(world) / "run.json").write_text("{")
    luthier.generate(world.folder / "run", "1?")


@provokes("run-ambiguous", "'ru' may be", "run-2", "Write more of the id")
def a_name_that_several_runs_have(world):
    world.train()
    world.train(fresh=True)
    return world.command("runs", "show", "ru", "--dir", world.folder)


@provokes("run-not-running", "run", "the run is stopped", "the command that began it")
def a_checkpoint_of_a_run_that_does_not_train(world):
    return world.command("checkpoint", stop_run(world))


@provokes("run-silent", "run", "no checkpoint within 0.01 seconds", "--timeout")
def a_run_that_never_ends_its_step(world):
    with locked_folder(stop_run(world)):
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
    manifest = stop_run(world) / "checkpoints/step-00000001/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99, "luthier": "12.0"}))
    world.train()


@provokes("checkpoint-corrupt", "step-00000001", "state.safetensors is damaged, and no other is whole", "--fresh")
def a_damaged_checkpoint(world):
    state = stop_run(world) / "checkpoints/step-00000001/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    world.train()


@provokes("checkpoint-other", "step-00000001", "optimizer was 'adamw', is 'sgd'", "--allow-changed parts")
def a_checkpoint_of_another_optimizer(world):
    checkpoint = stop_run(world) / "checkpoints/step-00000001"
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


@provokes("file-damaged", "luthier.json", "damaged", "Copy or download the file again")
def an_adapter_whose_note_is_damaged(world):
    (world.train().artifact / "luthier.json").write_text("{")
    luthier.generate(world.folder / "run", "1?")


@provokes("artifact-uncarried", "adapter", "Fraction is not JSON serializable", "Leave out the option")
def an_adapter_whose_options_its_files_cannot_hold(world):
    class Unwritable(FullTuning):
        def save(self, folder):
            raise TypeError("Object of type Fraction is not JSON serializable")

    world.train(adapter=Unwritable(NoOptions()))


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
    shutil.rmtree(stop_run(world) / "checkpoints")
    luthier.generate(world.folder / "run", "1?")


@provokes("artifact-not-found", "without luthier.json", "load it with peft")
def an_adapter_of_plain_peft(world):
    artifact = world.train().artifact
    (artifact / "luthier.json").unlink()
    luthier.merge(artifact)


@cases_of(__name__)
def test_the_error_says_where_what_and_what_to_do(world, code, act, fragments):
    check_error(world, code, act, fragments)
