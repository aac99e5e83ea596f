"""Every error code is met as a user would meet it: the place, what was found, what to do; and its exit status."""

import re
import sys
from pathlib import Path

import luthier
from luthier import AdapterRecord, Recipe
from luthier.errors import CODES
from luthier.plugins.registry import Plugins
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from provoking import OFFER, cases_of, check_error, provokes

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


@provokes("recipe-missing", "model: a loaded model needs its tokenizer", "tokenizer=")
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


@provokes("part-incompatible", "adapter 'full' needs dense-weights", "quantizer 'int8'", "Leave the quantizer out")
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


@provokes("part-unsupported", "has an adapter already", "load the model again")
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


ROOT = Path(__file__).resolve().parents[1]


def provoked_codes():
    """The codes that the files of errors provoke."""
    texts = [path.read_text("utf-8") for path in Path(__file__).parent.glob("test_errors*.py")]
    return {code for text in texts for code in re.findall(r'^@provokes\(\s*"([a-z-]+)"', text, re.MULTILINE)}


def asserted_with_jobs():
    """The codes that the tests of jobs and providers name, each of which needs a service to be provoked."""
    tests = [*(ROOT / "core/tests/jobs").glob("*.py"), ROOT / "core/tests/cli/test_jobs.py"]
    tests += (ROOT / "plugins").glob("*/tests/*.py")
    text = "\n".join(path.read_text("utf-8") for path in tests)
    return {code for code in CODES if f'"{code}"' in text}


def test_every_code_is_provoked():
    assert provoked_codes() <= CODES.keys()
    assert CODES.keys() - provoked_codes() - asserted_with_jobs() == set()


@cases_of(__name__)
def test_the_error_says_where_what_and_what_to_do(world, code, act, fragments):
    check_error(world, code, act, fragments)
