"""The documentation holds: generated pages are current, code and recipes in pages work, commands and links exist."""

import gzip
import inspect
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import luthier
import pytest
import yaml
from luthier import Recipe, TrainerSession
from luthier.cli.app import app
from luthier.cli.screen.recipe_arguments import split_words
from luthier.demo import MODEL
from luthier.errors import CODES
from luthier.model.operations.signatures import REFERENCES
from luthier.plugins import events, hookspecs
from luthier.plugins.contracts import policy_protocol, protocols
from luthier.plugins.options import describe_options
from luthier.plugins.records import RECORDS
from luthier.plugins.registry import Plugins
from luthier.recipe import Data, Model, Source, load_recipe, parse_flags, parse_sets
from luthier.recipe.schema import OtherModel
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
MEMBERS = [ROOT / "core", ROOT / "kernels", *sorted(p.parent for p in ROOT.glob("*/*/pyproject.toml"))]
GENERATE = runpy.run_path(str(ROOT / "tests/generate_docs.py"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"\(`([a-z]+-[a-z-]+)`\)")


def fences(page, kind):
    return [body for found, body in FENCE.findall(page.read_text("utf-8")) if found == kind]


def plain(text):
    """The text as a page writes it inside a table."""
    return text.replace("|", "\\|").replace("\n", " ")


@pytest.fixture
def conversations(tmp_path, monkeypatch):
    """`train.jsonl` of eight conversations in the working folder, which is `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def row(i):
        question = {"role": "user", "content": f"Use the tool clock. How late is it in {i} hours?"}
        return {"messages": [question, {"role": "assistant", "content": f"clock({i})"}]}

    rows = [row(i) for i in range(8)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


# generated pages


@pytest.mark.parametrize("name", GENERATE["pages"]())
def test_a_generated_page_is_what_the_code_says(name):
    current = (DOCS / name).read_text("utf-8") == GENERATE["pages"]()[name]
    assert current, f"docs/{name} is not current: run `python tests/generate_docs.py` and commit what it writes"


CONTRACTS = {
    **{f"operation {name}": function for name, function in REFERENCES.items()},
    **{f"hook {name}": getattr(hookspecs, name) for name in hookspecs.HOOKS.values()},
    **{f"event {name}": getattr(events.Events, name) for name in events.EVENTS},
    **{
        f"{name}.{member}": function
        for name, cls in {**protocols.PROTOCOLS, "policy": policy_protocol.Policy, "session": TrainerSession}.items()
        for member, function in vars(cls).items()
        if inspect.isfunction(function) and (member == "__call__" or not member.startswith("_"))
    },
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_contract_stands_in_the_hooks_page_under_its_exact_signature(name):
    function = CONTRACTS[name]
    heading = f"#### `{function.__name__}{inspect.signature(function)}`".replace("'", "")
    assert heading in (DOCS / "hooks.md").read_text("utf-8").splitlines()


def test_every_record_and_its_fields_stand_in_the_hooks_page():
    page = (DOCS / "hooks.md").read_text("utf-8")
    for cls in RECORDS.values():
        assert f"- `{cls.__name__}({', '.join(inspect.signature(cls).parameters)})`" in page


def test_every_error_code_stands_in_the_errors_page_with_cause_and_remedy():
    page = (DOCS / "errors.md").read_text("utf-8")
    for name, code in CODES.items():
        assert f"| `{name}` | {code.cause} | {plain(code.remedy)} | {code.exit_status} |" in page


def test_every_error_code_that_a_page_names_exists():
    named = {code for page in PAGES for code in CODE.findall(page.read_text("utf-8"))}
    assert named and named <= CODES.keys()


def section(title):
    """The options page from a heading to the next one."""
    page = (DOCS / "options.md").read_text("utf-8")
    assert page.count(f"\n{title}\n") == 1
    return re.split(r"^##", page.partition(f"\n{title}\n")[2], maxsplit=1, flags=re.M)[0]


def missing(options, text):
    """The options of which the text has no row that begins with name and type and ends with the meaning."""
    lines = text.splitlines()
    rows = {o.name: (f"| `{o.name}` | {plain(o.type)} |", f"| {plain(o.bounds.help)} |") for o in options}
    return [name for name, (a, b) in rows.items() if not any(x.startswith(a) and x.endswith(b) for x in lines)]


OURS = GENERATE["first_party"]()
OFFERS = [o for o in Plugins(blocked=["peft", "trl"]).offers() if o.source.distribution in OURS]


def test_every_member_of_the_repository_offers_parts_here():
    offering = {offer.source.distribution for offer in OFFERS} | {
        "luthier-peft",
        "luthier-trl",
    }  # whose options are PEFT's own and TRL's own
    assert offering == OURS, "the pages are generated from what is installed: pip install -r tests/requirements.txt"


@pytest.mark.parametrize("offer", OFFERS, ids=lambda offer: f"{offer.record.kind}-{offer.record.name}")
def test_every_option_of_a_part_stands_in_the_options_page(offer):
    found = section(f"### `{offer.record.name}`")
    assert missing(describe_options(offer.record.options), found) == []
    assert offer.record.summary in found
    assert offer.source.distribution in found


@pytest.mark.parametrize(("cls", "title"), [(Recipe, "## The run"), (Model, "### `model`"), (Data, "### `data`"),
                                            (OtherModel, "### `teacher, reference`"),
                                            (Source, "### `data.train[], data.validation[]`")])  # fmt: skip
def test_every_setting_of_a_run_stands_in_the_options_page(cls, title):
    assert missing(describe_options(cls), section(title)) == []


# what pages show


def test_the_recipe_of_the_readme_reads_and_prepares_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [text] = fences(README, "yaml")
    Path("recipe.yaml").write_text(text)
    recipe = Recipe.load("recipe.yaml")
    assert (recipe.adapter.r, recipe.learning_rate, recipe.data.validation) == (16, 2e-4, 0.02)
    assert recipe.output_dir == str(tmp_path / "runs/gsm8k")
    rows = [{"question": f"{i} and {i}?", "answer": str(2 * i)} for i in range(60)]
    Path("train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = luthier.inspect("recipe.yaml", model="demo")
    assert found.report.format == "prompt_completion"
    assert (found.report.examples, found.report.validation.examples) == (59, 1)


def test_the_three_lines_of_the_readme_train(conversations, capsys):
    [code] = fences(README, "python")
    assert len([line for line in code.splitlines() if line]) == 3
    run = executed(code)["run"]
    assert run.steps == 1
    assert run.parts[0]["name"] == "lora"
    assert capsys.readouterr().out.strip()


def executed(code, **names):
    """The names after the code, with those that it is given."""
    exec(compile(code, "<page>", "exec"), names)
    return names


def test_the_python_of_the_training_page_runs(conversations, tmp_path):
    data = {"train": "train.jsonl", "validation": 0.25}
    update = {"name": "lora", "lora_alpha": 4096}  # so large that the merged model's dtype keeps one step of it
    recipe = {"model": "demo", "data": data, "adapter": update, "max_steps": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    swapping, using, writing = fences(DOCS / "training.md", "python")
    run = executed(using, more_rows=conversations)["run"]
    assert run.output_path == tmp_path / "runs/slower"
    assert Path("my-adapter/adapter_model.safetensors").is_file()
    assert Path("my-model/model.safetensors").is_file()
    shutil.copytree("runs/slower", "runs/a")
    shutil.copytree("my-adapter", "runs/b")
    executed(swapping, luthier=luthier)
    written = executed(writing, luthier=luthier, rows=conversations)["run"]
    assert written.loss_history[0] > 0
    assert {p["kind"]: p["distribution"] for p in written.parts}["loss"] is None


@pytest.mark.parametrize("text", fences(DOCS / "data.md", "yaml"))
def test_the_settings_of_the_data_page_are_settings(text):
    settings = yaml.safe_load(text)
    recipe = Recipe.from_dict({"model": "demo", "data": settings.get("data", settings)})
    plain = ("chats.jsonl", "books/*.txt.gz", "new.jsonl", "old.jsonl")
    assert all(source.columns or source.template or source.path in plain for source in recipe.data.train)


# what pages name


def commands(page):
    """Every `luthier ...` that a page shows: in a block, in a line of text, alone or behind `&&`."""
    text = page.read_text("utf-8")
    shown = re.findall(r"^    (.+)$|`(luthier [^`\n]+)`", FENCE.sub("", text), re.M)
    lines = [block or inline for block, inline in shown] + [x for b in fences(page, "sh") for x in b.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|\|\|?|;", line)]
    return [part for part in parts if part.startswith("luthier ")]


EVERY = sorted({*PAGES, MODEL.parent / "README.md", *(member / "README.md" for member in MEMBERS)})
OTHERS = [page for page in EVERY if page.name not in ("tutorial.md", "json.md")]  # one is carried out, one lists verbs
COMMANDS = sorted({line for page in OTHERS for line in commands(page)})


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_a_page_shows_exists(line):
    command, words = get_command(app), shlex.split(line, comments=True)[1:]
    if words[0].startswith("-"):  # a flag such as --install-completion acts as soon as it is read
        assert words[0] == "--help" or any(words[0] in parameter.opts for parameter in command.params)
        return
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, [word for word in words if word != "--help"])
    if context.args:  # train, plan and inspect read them as flags of the recipe; no other verb has any left
        _, flags = split_words(context.args)
        load_recipe(
            {"model": "demo", "data": "train.jsonl"}, [*parse_flags(flags), *parse_sets(context.params["sets"] or ())]
        )


def test_pages_show_every_verb():
    verbs = {line.split()[1] for line in COMMANDS}
    assert verbs >= get_command(app).commands.keys() - {"doctor"}


def links():
    found = {(page, link) for page in EVERY for link in LINK.findall(FENCE.sub("", page.read_text("utf-8")))}
    return sorted((page, link) for page, link in found if "://" not in link)


@pytest.mark.parametrize(("page", "link"), links(), ids=lambda value: getattr(value, "name", value))
def test_a_link_leads_somewhere(page, link):
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    assert target.exists()
    assert target.is_relative_to(ROOT)
    if anchor:
        headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_index_names_every_page():
    linked = set(LINK.findall((DOCS / "index.md").read_text("utf-8")))
    assert linked == {p.name for p in DOCS.iterdir()} - {"index.md", "images"}


def test_the_readme_names_every_member():
    page = README.read_text("utf-8")
    assert all(f"`{m.relative_to(ROOT)}`" in page or f"`{m.name}`" in page for m in MEMBERS)
