"""Completion: what a shell asks through its variables, and the words that it is given."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from luthier.cli.app import app
from luthier.plugins.registry import installed_plugins
from typer.testing import CliRunner

HEAVY = {"torch", "transformers", "numpy", "peft", "pydantic"}
BOUND = 0.5  # seconds of CPU time, user and system, once the words are kept


def bash_variables(line):
    """What bash says to a completer: the words, and the number of the one that is written."""
    words = shlex.split(line.replace("=", " = ")) + ([""] if line.endswith((" ", "=")) else [])
    return {"_LUTHIER_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}


def zsh_variables(line):
    return {"_LUTHIER_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("words")


@pytest.fixture
def complete(cache, tmp_path, monkeypatch):
    """`complete("luthier train --ad")`: the words that bash is given, in a folder with recipes and a run."""
    monkeypatch.setenv("LUTHIER_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("first.yaml").write_text("model: demo\ndata: rows.jsonl\nadapter: {name: lora}\n")
    Path("recipes/second.toml").write_text('model = "demo"\n')
    Path("other.yaml").write_text("steps: [build, test]\n")
    for name in ("alpha", "beta"):
        Path("runs", name, "checkpoints").mkdir(parents=True)

    def words(line):
        return CliRunner().invoke(app, [], env=bash_variables(line), prog_name="luthier").stdout.split()

    return words


def test_verbs_flags_and_values_are_completed(complete):
    assert complete("luthier ins") == ["inspect"]
    assert complete("luthier train --learning") == ["--learning-rate"]
    assert complete("luthier train --learning_") == ["--learning_rate"]
    assert complete("luthier train --log-l") == ["--log-level"]
    assert complete("luthier train --log-level d") == ["debug"]
    assert complete("luthier train --no-pac") == ["--no-packing"]
    assert complete("luthier train --precision b") == ["bf16"]
    assert complete("luthier train --packing=") == ["true", "false"]
    assert complete("luthier train --set packing=") == ["true", "false"]
    assert complete("luthier train --set packing=true fi") == ["first.yaml"]
    assert complete("luthier plan --distributed.strat") == ["--distributed.strategy"]
    assert complete("luthier train --data.form") == ["--data.format"]
    assert "sharegpt" in complete("luthier train --data.format ")


def test_installed_parts_are_completed_wherever_one_is_named(complete):
    names = {
        kind: [offer.record.name for offer in installed_plugins().offers(kind)] for kind in ("adapter", "callback")
    }
    assert complete("luthier train --adapter ") == [*names["adapter"], "qlora", "qdora"]
    assert "qlora" in complete("luthier init new.yaml --method q")
    assert complete("luthier plan first.yaml --adapter lo") == [n for n in names["adapter"] if n.startswith("lo")]
    assert complete("luthier train --callbacks ") == [*names["callback"], "-progress", "-jsonl", "-plot"]
    assert complete("luthier plugins show loss sf") == ["sft"]
    assert complete("luthier plugins show ada") == ["adapter"]
    assert complete("luthier new-plugin warm --kind opt") == ["optimizer"]
    assert complete("luthier providers show lo") == ["local"]


def test_options_of_the_chosen_part_are_completed(complete):
    assert complete("luthier train --optimizer sgd --optimizer.mom") == ["--optimizer.momentum"]
    assert complete("luthier train --optimizer=sgd --optimizer.mom") == ["--optimizer.momentum"]
    assert complete("luthier train --optimizer.mom") == []  # adamw, the default, has none
    assert "--optimizer.betas" in complete("luthier train --optimizer.")
    assert complete("luthier train first.yaml --adapter lora --adapter.lora-al") == ["--adapter.lora-alpha"]
    assert complete("luthier train first.yaml --adapter.lora-al") == ["--adapter.lora-alpha"]
    assert complete("luthier train --set optimizer.weight") == ["optimizer.weight_decay="]
    assert complete("luthier train --set learning") == ["learning_rate="]


def test_recipes_and_runs_are_completed(complete):
    assert complete("luthier train ") == ["first.yaml", "recipes/second.toml"]
    assert complete("luthier train rec") == ["recipes/second.toml"]
    assert complete("luthier train recipes/") == ["recipes/second.toml"]
    assert complete("luthier generate ") == ["runs/alpha", "runs/beta", "demo"]
    assert complete("luthier evaluate runs/b") == ["runs/beta"]
    assert complete("luthier runs show al") == ["alpha"]


def test_zsh_is_given_words_with_one_line_of_meaning_each(cache, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(cache))
    said = CliRunner().invoke(app, [], env=zsh_variables("luthier train --optimizer ada"), prog_name="luthier").stdout
    inner = said.removeprefix("_arguments '*: :((").removesuffix("))'\n")
    assert inner != said
    for line in inner.splitlines():
        word, colon, told = line[1:].partition('":"')
        assert word.startswith("ada")
        assert colon
        assert 0 < len(told) < 70
    behind = zsh_variables("luthier train --optimizer=ada")  # which bash would divide
    assert '"--optimizer=adamw"' in CliRunner().invoke(app, [], env=behind, prog_name="luthier").stdout
    nothing = CliRunner().invoke(app, [], env=zsh_variables("luthier train --data x"), prog_name="luthier").stdout
    assert nothing.strip() == "_files"


def test_a_plugin_that_comes_or_goes_is_noticed(complete, cache, monkeypatch):
    assert "lora" in complete("luthier train --adapter ")
    monkeypatch.setenv("LUTHIER_DISABLE_PLUGINS", "luthier-lora")
    installed_plugins.cache_clear()
    assert "lora" not in complete("luthier train --adapter ")
    installed_plugins.cache_clear()
    monkeypatch.delenv("LUTHIER_DISABLE_PLUGINS")
    assert "lora" in complete("luthier train --adapter ")
    (cache / "completion.json").write_text("{")  # half written
    assert "lora" in complete("luthier train --adapter ")
    assert json.loads((cache / "completion.json").read_text())["parts"]["adapter"]["lora"]


def press_the_key(cache):
    """The libraries that a process of its own has loaded to complete a word, and the CPU time that it took."""
    source = (
        "import sys\nfrom luthier.cli import main\nsys.argv = ['luthier']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print('', *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    environment = {**os.environ, **bash_variables("luthier train --adapter lo"), "LUTHIER_CACHE": str(cache)}

    before = os.times()
    done = subprocess.run([sys.executable, "-c", source], env=environment, check=True, capture_output=True, text=True)
    after = os.times()
    assert "lora" in done.stdout.split()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return set(done.stderr.splitlines()[-1].split()), seconds


def test_a_press_of_the_key_loads_nothing_heavy(cache):
    press_the_key(cache)  # keeps the words
    assert not HEAVY & press_the_key(cache)[0]


@pytest.mark.slow  # a time, which other work on the machine lengthens
def test_a_press_of_the_key_is_quick(cache):
    press_the_key(cache)  # keeps the words
    assert min(press_the_key(cache)[1] for _ in range(6)) < BOUND


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shells_own_script_is_shown(monkeypatch, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = CliRunner().invoke(app, ["--show-completion", shell], prog_name="luthier")
    assert shown.exit_code == 0
    assert f"_LUTHIER_COMPLETE=complete_{shell}" in shown.stdout
