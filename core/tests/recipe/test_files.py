"""Recipe files: three formats with one meaning, YAML 1.2, and errors that name file and line."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Recipe
from luthier.recipe.reading import yaml12
from luthier.recipe.reading.recipe_files import read_recipe_file

YAML = """\
# a comment
model: demo
data:
  train: rows.jsonl
  max_length: 64
adapter: {name: lora, r: 16,
          lora_alpha: 32}
learning_rate: 2e-4
"""
TOML = """\
model = "demo"
learning_rate = 2e-4

[data]
train = "rows.jsonl"
max_length = 64

[adapter]
name = "lora"
r = 16
lora_alpha = 32
"""
JSON = """\
{
  "model": "demo",
  "data": {"train": "rows.jsonl", "max_length": 64},
  "adapter": {
    "name": "lora",
    "r": 16,
    "lora_alpha": 32
  },
  "learning_rate": 2e-4
}
"""
SAME = {"r.yaml": YAML, "r.toml": TOML, "r.json": JSON}


def failure(read, path, *rest):
    with pytest.raises(LuthierError) as caught:
        read(path, *rest)
    return caught.value


def test_three_formats_say_the_same(file, read):
    recipes = [read(file(name, text)).recipe for name, text in SAME.items()]
    assert recipes[0] == recipes[1] == recipes[2]
    assert recipes[0].adapter.lora_alpha == 32
    assert recipes[0].learning_rate == 2e-4


@pytest.mark.parametrize(("name", "line"), [("r.yaml", 7), ("r.toml", 11), ("r.json", 7)])
def test_a_wrong_value_is_named_with_file_line_and_path(file, read, name, line):
    path = file(name, SAME[name].replace("32", '"16"'))
    error = failure(read, path)
    assert str(error).startswith(f"{path}:{line}: adapter.lora_alpha: expected int (found '16')")
    assert error.code == "recipe-wrong-type"


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("lora_alpha: 32", "lora_alfa: 32", "recipe-unknown-option", ("recipe.yaml:7: adapter.lora_alfa", "'lora_alpha'")),
        ("r: 16", "r: 0", "recipe-out-of-range", ("recipe.yaml:6: adapter.r", "0", "1")),
        ("name: lora", "name: lorra", "part-unknown", ("recipe.yaml:6: adapter", "'lorra'", "'lora'")),
        ("max_length", "max_lenght", "recipe-unknown-option", ("recipe.yaml:5: data.max_lenght", "'max_length'")),
        ("learning_rate", "learning_rat", "recipe-unknown-option", ("recipe.yaml:8: learning_rat", "'learning_rate'")),
        ("rows.jsonl", "[{pth: a}]", "recipe-unknown-option", ("recipe.yaml:4: data.train.0.pth", "'path'")),
        ("rows.jsonl", "[{path: a, columns: {prompt: 3}}]", "recipe-wrong-type", ("recipe.yaml:4: data.train.0.columns.prompt", "3")),
        ("2e-4", "fast", "recipe-wrong-type", ("recipe.yaml:8: learning_rate", "'auto'", "'fast'")),
        ("2e-4", "true", "recipe-wrong-type", ("recipe.yaml:8: learning_rate", "'auto'")),
        ("2e-4", "2e-4\npacking: yes", "recipe-wrong-type", ("recipe.yaml:9: packing", "'yes'")),
        ("2e-4", "2e-4\nseed: 1.5", "recipe-wrong-type", ("recipe.yaml:9: seed", "1.5")),
        ("2e-4", "2e-4\ncallbacks:\n- jsonl\n- {name: watch, evry: 2}", "recipe-unknown-option", ("recipe.yaml:11: callbacks.1.evry", "'watch'", "'every'")),
        ("2e-4", "2e-4\nwarmup_steps: 3\nwarmup_ratio: 0.1", "recipe-conflict", ("recipe.yaml:10: warmup_ratio", "warmup_steps", "3")),
        ("model: demo\n", "", "recipe-missing", ("recipe.yaml: model",)),
        ("2e-4", "${NOWHERE}", "recipe-missing", ("recipe.yaml:8: learning_rate", "NOWHERE")),
        ("{name: lora, r: 16,\n          lora_alpha: 32}", "{dora: {r: 4}}", "recipe-unknown-option", ("recipe.yaml:6: adapter.dora", "{name: dora, ...}")),
        ("{name: lora, r: 16,\n          lora_alpha: 32}", "full\nlora_r: 4", "recipe-unknown-option", ("recipe.yaml:7: adapter.r", "'full'")),
    ],
)  # fmt: skip
def test_every_error_has_its_line(file, read, old, new, code, says):
    path = file("recipe.yaml", YAML.replace(old, new))
    error = failure(read, path)
    assert error.code == code
    assert all(fact in str(error) for fact in says), str(error)


@pytest.mark.parametrize(
    ("name", "text", "line", "says"),
    [
        ("r.yaml", "a: 1\nb: [1,\nc: 2\n", 3, ("expected",)),
        ("r.yaml", "a: 1\nb: 2\na: 3\n", 3, ("r.yaml:3", "1")),
        ("r.yaml", "a: 1\n\tb: 2\n", 2, ("r.yaml:2",)),
        ("r.yaml", "a: &x [*x]\n", 1, ("r.yaml:1",)),
        ("r.yaml", "a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, ("r.yaml:2",)),
        ("r.yaml", "a: !!binary aGk=\n", 1, ("r.yaml:1",)),
        ("r.yaml", "a: *nowhere\n", 1, ("r.yaml:1",)),
        ("r.yaml", "a: 1\n---\nb: 2\n", 2, ("r.yaml:2",)),
        ("r.yaml", "a: 1\n? [b]\n: 2\n", 2, ("r.yaml:2",)),
        ("r.yaml", "a: 1\nb: \x07\n", 2, ("r.yaml:2",)),
        ("r.yaml", "a: !!int x\n", 1, ("r.yaml:1", "'x'")),
        ("r.json", '{\n"a": 1,\n}', 3, ("r.json:3", "JSON")),
        ("r.json", '{\n"a": 1,\n"a": 2}', 3, ("r.json:3", "'a'")),
        ("r.toml", 'a = 1\nb = \n', 2, ("r.toml:2", "TOML")),
        ("r.toml", "a = 1\na = 2\n", 2, ("r.toml:2", "TOML")),
    ],
)  # fmt: skip
def test_a_file_that_is_not_its_format_is_refused_at_the_line(file, name, text, line, says):
    path = file(name, text)
    error = failure(read_recipe_file, path)
    assert error.code == "recipe-syntax"
    assert error.where == f"{path}:{line}"
    assert all(fact in str(error) for fact in says), str(error)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.yaml", b"", ("r.yaml",)),
        ("r.yaml", b"- a\n- b\n", ("r.yaml",)),
        ("r.json", b"[]", ("r.json",)),
        ("r.yaml", b"a: 1\nb: \xff\xfe\n", ("r.yaml:2", "UTF-8")),
        ("r.json", b'{"a": "\\ud800"}', ("half a character",)),
        ("r.toml", b"a = 1979-05-27\n", ("r.toml",)),
        ("r.txt", b"a: 1\n", ("r.txt",)),
        ("r.yaml", b"[" * 50_000, ("r.yaml:1",)),
        ("r.json", b"[" * 100_000, ("r.json",)),
        ("r.json", b'{"a": ' + b"9" * 5000 + b"}", ("r.json:1",)),
        ("r.yaml", b"a: " + b"9" * 5000, ("r.yaml:1",)),
        ("r.toml", b"a = " + b"9" * 5000, ("r.toml", "TOML")),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_no_recipe_is_refused(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    error = failure(read_recipe_file, path)
    assert error.code == "recipe-syntax"
    assert error.where.startswith(str(path))
    assert all(fact in str(error) for fact in says), str(error)


def test_aliases_of_aliases_do_not_fill_the_memory(file):
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    error = failure(read_recipe_file, file("r.yaml", f"a0: &a0 [x]\n{levels}\n"))
    assert error.code == "recipe-syntax" and "r.yaml" in error.where


def test_a_missing_file_names_its_neighbour(file):
    path = file("recipe.yaml", YAML)
    error = failure(read_recipe_file, path.with_name("recpie.yaml"))
    assert error.code == "recipe-not-found"
    assert error.remedy == "Did you mean 'recipe.yaml'?"


def test_a_folder_without_a_recipe_is_refused_and_one_with_it_is_read(file, read):
    path = file("recipe.yaml", YAML)
    assert read(path.parent).recipe == read(path).recipe
    path.unlink()
    assert failure(read_recipe_file, path.parent).code == "recipe-syntax"


def test_yaml_reads_its_own_version_12():
    text = "[yes, no, on, off, y, Yes, 2e-4, 1_000, 012, 0o17, 0x1F, 1:30, 2024-01-01, ~, null, true, .5, .inf, <<, =]"
    value, _ = yaml12.load_yaml(text, "")
    assert value == [
        "yes", "no", "on", "off", "y", "Yes", 2e-4, "1_000", 12, 15, 31, "1:30", "2024-01-01", None, None, True, 0.5,
        float("inf"), "<<", "=",
    ]  # fmt: skip


def test_none_is_a_word_where_only_none_fits(make):
    assert make(max_grad_norm="none").max_grad_norm is None
    assert make(run_name="none").run_name == "none"
    assert make(quantizer="none").quantizer is not None


def test_toml_without_null_can_say_none(file, read):
    assert read(file("r.toml", 'max_grad_norm = "none"\n' + TOML)).recipe.max_grad_norm is None


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(value=plain)
@example(value={"a": "2e-4", "b": "0o17", "c": "yes", "d": "1:30", "e": " x\n", "f": "\x85\u2028é😀", "g": "~"})
def test_what_is_dumped_is_read_back_equal(value):
    again, _ = yaml12.load_yaml(yaml12.dump_yaml(value), "")
    assert again == value
    assert json.dumps(again) == json.dumps(value)  # 1 is not 1.0 is not True


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(SAME)),
    place=st.integers(0, 200),
    junk=st.binary(min_size=1, max_size=6),
    cut=st.booleans(),
)
def test_a_damaged_file_gives_an_error_with_its_place_or_a_recipe(plugins, tmp_path_factory, name, place, junk, cut):
    text = SAME[name].encode()
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(text[:place] + junk + (b"" if cut else text[place + len(junk) :]))
    try:
        recipe = Recipe.load(path, environ={}, plugins=plugins)
    except LuthierError as error:
        assert error.where
        assert error.code.startswith(("recipe-", "part-"))
    else:
        assert isinstance(recipe, Recipe)


def test_relative_paths_in_a_file_are_relative_to_it(file, read, monkeypatch, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "rows").write_text("")
    path = file(
        "r.yaml",
        "model: {name_or_path: base, tokenizer: ../tok}\n"
        "data:\n  train: [a.jsonl, local/rows, 'more/*.csv', owner/name, /abs/b.txt, ~/c.json, ./d]\n"
        "  validation: [v.jsonl.gz]\n  chat_template: t.jinja\noutput_dir: runs/x\n",
    )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/home/u")
    recipe = read(Path("..") / path.name).recipe
    at = str(tmp_path)
    assert recipe.model.name_or_path == f"{at}/base"
    assert recipe.model.tokenizer == str(tmp_path.parent / "tok")
    assert [s.path for s in recipe.data.train] == [
        f"{at}/a.jsonl", f"{at}/local/rows", f"{at}/more/*.csv", "owner/name", "/abs/b.txt", "/home/u/c.json", f"{at}/d",
    ]  # fmt: skip
    assert recipe.data.validation[0].path == f"{at}/v.jsonl.gz"
    assert recipe.data.chat_template == f"{at}/t.jinja"
    assert recipe.output_dir == f"{at}/runs/x"


def test_hub_names_demo_and_inline_templates_are_no_paths(file, read, tmp_path):
    (tmp_path / "demo").mkdir()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text = f"model: demo\ndata: {{train: openai/gsm8k, chat_template: {json.dumps(template)}}}\n"
    recipe = read(file("r.yaml", text), ["--data.validation", "[python:list, 'hf://a/b.jsonl']"]).recipe
    assert recipe.model.name_or_path == "demo"
    assert recipe.data.train[0].path == "openai/gsm8k"
    assert [s.path for s in recipe.data.validation] == ["python:list", "hf://a/b.jsonl"]
    assert recipe.data.chat_template == template


def test_flags_and_variables_are_relative_to_the_working_directory(file, read, monkeypatch, tmp_path):
    path = file("r.yaml", YAML)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = read(path, "--data b.jsonl", {"LUTHIER_OUTPUT_DIR": "out"}).recipe
    assert recipe.data.train[0].path == str(here / "b.jsonl")
    assert recipe.output_dir == str(here / "out")
    assert recipe.data.max_length == 64


def test_a_path_option_of_a_part_is_relative_to_its_file(file, read, tmp_path):
    recipe = read(file("r.yaml", "model: demo\ndata: a.jsonl\nadapter: {name: many, folder: sub/f}\n")).recipe
    assert recipe.adapter.folder == tmp_path / "sub" / "f"


def test_in_python_paths_stay_as_they_are_until_they_are_written(make, plugins, tmp_path, monkeypatch):
    recipe = make(output_dir="runs/x")
    assert (recipe.data.train[0].path, recipe.output_dir) == ("rows.jsonl", "runs/x")
    monkeypatch.chdir(tmp_path)
    recipe.write("r.yaml", plugins)
    monkeypatch.chdir("/")
    again = Recipe.load(tmp_path / "r.yaml", environ={}, plugins=plugins)
    assert (again.data.train[0].path, again.output_dir) == (f"{tmp_path}/rows.jsonl", f"{tmp_path}/runs/x")


def test_path_objects_are_paths(plugins, tmp_path):
    mapping = {"model": tmp_path / "m", "data": [tmp_path / "a.jsonl"], "output_dir": tmp_path}
    recipe = Recipe.from_dict(mapping, plugins=plugins)
    assert (recipe.model.name_or_path, recipe.output_dir) == (f"{tmp_path}/m", str(tmp_path))


def test_variables_stand_in_paths(file, read):
    path = file("r.yaml", 'model: demo\ndata: "${LUTHIER_DATA}/gsm8k/train.jsonl"\n')
    assert read(path, environ={"LUTHIER_DATA": "/sets"}).recipe.data.train[0].path == "/sets/gsm8k/train.jsonl"
    error = failure(read, path, "", {"LUTHER_DATA": "/sets"})
    assert error.where == f"{path}:2: data" and "LUTHIER_DATA" in error.problem
    assert "Did you mean 'LUTHER_DATA'?" in error.remedy
