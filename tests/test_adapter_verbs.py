"""Trained adapters combined, unmerged, swapped over one base and pushed: as a user does, against PEFT and a loopback hub."""

import json
import math
import shutil

import luthier
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.artifacts.factor_arithmetic import Blend, Pair, combine_pairs
from luthier.cli.app import app
from luthier.errors import LuthierError
from luthier.testing import expect_error
from luthier.testing.loopback import LoopbackServer, Reply
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

WEIGHTS = "adapter_model.safetensors"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
KEY = "hf_" + "a" * 34


@pytest.fixture(scope="module")
def train_adapter(tmp_path_factory, model_folder, rows):
    def train(seed, **changes):
        adapter = {"name": "lora", "r": 4, "lora_dropout": 0.0, **changes.pop("adapter", {})}
        folder = tmp_path_factory.mktemp("adapter") / "run"
        return luthier.train(model=str(model_folder), data=rows, adapter=adapter, max_steps=2, seed=seed,
                             learning_rate=1e-2, output_dir=folder, exact_callbacks=[], precision="float32",
                             **changes)  # fmt: skip

    return train


@pytest.fixture(scope="module")
def pair(train_adapter):
    """Two runs of LoRA on one base; the second has another alpha."""
    return train_adapter(0), train_adapter(1, adapter={"lora_alpha": 8})


def run_command(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout


@pytest.mark.parametrize(("method", "more"), [
    pytest.param("linear", {}, marks=pytest.mark.slow), ("cat", {}), ("ties", {"density": 0.4}),
])  # fmt: skip
def test_a_combined_adapter_has_the_factors_that_peft_gives(pair, model_folder, tmp_path, method, more):
    made = luthier.combine([run.output_path for run in pair], tmp_path / "made", method=method, weights=[0.7, -0.2],
                           **more)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    peer = PeftModel.from_pretrained(base, pair[0].artifact, adapter_name="a")
    peer.load_adapter(pair[1].artifact, adapter_name="b")
    peer.add_weighted_adapter(["a", "b"], [0.7, -0.2], "made", combination_type=method, **more)
    ours = load_file(made / WEIGHTS)
    for name, module in peer.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            for side in ("lora_A", "lora_B"):
                theirs = getattr(module, side)["made"].weight
                assert torch.allclose(ours.pop(f"base_model.model.{name}.{side}.weight"), theirs, atol=1e-6)
    assert not ours  # no tensor that PEFT's has not
    assert math.isclose(PeftModel.from_pretrained(base, made).peft_config["default"].r, 8 if method == "cat" else 4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_draws_what_peft_draws_from_the_same_seed(method):
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 8), "b": (6, 3)}
    pairs = [Pair(scale=2.0, **{side: torch.randn(shape, generator=draw) for side, shape in shapes.items()})
             for _ in range(3)]  # fmt: skip
    weights = (0.5, -1.0, 2.0)
    ours = combine_pairs(pairs, Blend(method=method, weights=weights, density=0.3), torch.Generator().manual_seed(7))
    roots = torch.tensor([2 * abs(weight) for weight in weights]).sqrt()
    torch.manual_seed(7)
    combine = getattr(merge_utils, method)
    theirs = [combine([pair.a for pair in pairs], roots * torch.tensor(weights).sign(), 0.3),
              combine([pair.b for pair in pairs], roots, 0.3)]  # fmt: skip
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(ours, theirs, strict=True))


def test_a_combined_adapter_answers_trains_on_and_says_what_it_is_of(pair, model_folder, tmp_path):
    folders = [run.output_path for run in pair]
    words = [*folders, "--output-dir", tmp_path / "made", "--method", "cat", "--weight", "2", "--weight", "0.5"]
    status, said = run_command("combine", *words, "--json")
    assert status == 0, said
    made = tmp_path / "made"
    updates = []
    for run, scale in zip(pair, (16 / 4, 8 / 4), strict=True):
        tensors = load_file(run.artifact / WEIGHTS)
        updates.append(scale * tensors[f"{QUERY}.lora_B.weight"] @ tensors[f"{QUERY}.lora_A.weight"])
    merged = load_file(luthier.merge(made) / "model.safetensors")[f"{QUERY.removeprefix('base_model.model.')}.weight"]
    base = load_file(model_folder / "model.safetensors")[f"{QUERY.removeprefix('base_model.model.')}.weight"]
    assert torch.allclose(merged - base, 2 * updates[0] + 0.5 * updates[1], atol=1e-5)
    assert isinstance(luthier.generate(made, "1 and", max_new_tokens=2), str)
    assert json.loads((made / "luthier.json").read_text())["combined"]["weights"] == [2.0, 0.5]


def test_slao_of_files_is_the_merge_of_its_algorithm(pair, tmp_path):
    folder = luthier.combine([run.artifact for run in pair], tmp_path / "made", method="slao")
    assert json.loads((folder / "luthier.json").read_text())["combined"]["weights"] is None
    made = load_file(folder / WEIGHTS)
    first, second = (load_file(run.artifact / WEIGHTS) for run in pair)
    before, after = 4.0 * first[f"{QUERY}.lora_B.weight"], 2.0 * second[f"{QUERY}.lora_B.weight"]
    assert torch.equal(made[f"{QUERY}.lora_A.weight"], second[f"{QUERY}.lora_A.weight"])
    assert torch.allclose(made[f"{QUERY}.lora_B.weight"], before + (after - before) / math.sqrt(2), atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.lists(st.floats(-2, 2), min_size=2, max_size=3), st.floats(0.1, 3))
def test_cat_is_the_weighted_sum_of_updates_and_full_density_prunes_nothing(rank, weights, scale):
    draw = torch.Generator().manual_seed(rank)
    pairs = [Pair(a=torch.randn(rank, 5, generator=draw), b=torch.randn(6, rank, generator=draw), scale=scale)
             for _ in weights]  # fmt: skip
    a, b = combine_pairs(pairs, Blend(method="cat", weights=tuple(weights)), draw)
    wanted = sum(weight * scale * pair.b @ pair.a for weight, pair in zip(weights, pairs, strict=True))
    assert torch.allclose(b @ a, wanted, atol=1e-4)
    linear = combine_pairs(pairs, Blend(method="linear", weights=tuple(weights)), draw)
    kept = combine_pairs(pairs, Blend(method="dare_linear", weights=tuple(weights), density=1.0), draw)
    assert all(torch.equal(one, other) for one, other in zip(linear, kept, strict=True))
    alone = combine_pairs(pairs[:1], Blend(method="linear", weights=(1.0,)), draw)
    assert torch.allclose(alone[1] @ alone[0], scale * pairs[0].b @ pairs[0].a, atol=1e-4)


def changed_tensors(folder, into, change):
    shutil.copytree(folder, into)
    tensors = load_file(into / WEIGHTS)
    change(tensors)
    save_file(tensors, into / WEIGHTS)
    return into


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.update({f"{QUERY}.extra.weight": torch.zeros(2)}), ("adapter_model.safetensors",)),
    (lambda t: t.pop(f"{QUERY}.lora_B.weight"), ("missing",)),
    (lambda t: [t.pop(f"{QUERY}.lora_{s}.weight") for s in "AB"], ("damaged",)),
    (lambda t: t[f"{QUERY}.lora_B.weight"].fill_(float("nan")), ("NaN",)),
    (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(2, 64)}), ("adapter_model.safetensors",)),
])  # fmt: skip
def test_every_tensor_is_consumed_and_none_is_missing(pair, tmp_path, change, said):
    damaged = changed_tensors(pair[1].artifact, tmp_path / "damaged", change)
    with pytest.raises(LuthierError) as caught:
        luthier.combine([pair[0].artifact, damaged], tmp_path / "made")
    assert all(fact in str(caught.value) for fact in said)
    assert caught.value.code == "artifact-mismatch" and not (tmp_path / "made").exists()


@pytest.mark.parametrize(("more", "where"), [
    ({"method": "tie"}, "method"), ({"weights": [1.0]}, "weights"), ({"method": "ties"}, "density"),
    ({"density": 0.5}, "density"), ({"method": "ties", "density": 0.0}, "density"), ({"seed": 1}, "seed"),
    ({"method": "slao", "weights": [1.0, 1.0]}, "weights"), ({"weights": [math.nan, 1.0]}, "weights"),
    ({"weights": [1.0, math.inf]}, "weights"),
])  # fmt: skip
def test_what_a_method_does_not_know_is_refused_before_a_file_is_read(tmp_path, more, where):
    with pytest.raises(LuthierError) as caught:
        luthier.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "made", **more)
    assert (caught.value.code, caught.value.where) == ("recipe-out-of-range", where)


def test_adapters_of_two_bases_are_not_combined(pair, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair[1].artifact, other)
    note = json.loads((other / "luthier.json").read_text())
    (other / "luthier.json").write_text(json.dumps({**note, "base": "0" * 16}))
    with expect_error("artifact-mismatch", "other"):
        luthier.combine([pair[0].artifact, other], tmp_path / "made")


def test_unmerging_gives_the_base_back_bit_for_bit_or_to_rounding(pair, model_folder, tmp_path):
    merged = luthier.merge(pair[0].output_path, tmp_path / "merged")
    base = load_file(model_folder / "model.safetensors")
    status, said = run_command("unmerge", merged, pair[0].output_path, "--output-dir", tmp_path / "exact", "--json")
    assert status == 0 and json.loads(said)["bit_exact"] is True
    back = load_file(tmp_path / "exact" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in base.items())
    stray = tmp_path / "stray"  # an adapter whose base is nowhere to be found
    shutil.copytree(pair[0].artifact, stray)
    note = json.loads((stray / "luthier.json").read_text())
    gone = {**note["model"], "name_or_path": str(tmp_path / "gone")}
    (stray / "luthier.json").write_text(json.dumps({**note, "model": gone}))
    back = load_file(luthier.unmerge(merged, stray, tmp_path / "near") / "model.safetensors")
    assert all(torch.allclose(back[name], tensor, atol=1e-6) for name, tensor in base.items())
    with expect_error("artifact-mismatch", "model.layers.0.self_attn.q_proj.weight"):
        luthier.unmerge(merged, pair[1].artifact, tmp_path / "wrong")


def card_of(folder):
    return (folder / "README.md").read_text()


def test_the_cards_of_what_no_run_has_made_say_what_it_was_made_of_and_nothing_of_a_runs_numbers(pair, tmp_path):
    first, second = pair
    combined = luthier.combine([run.artifact for run in pair], tmp_path / "both", method="cat", weights=[0.7, -0.2])
    merged = luthier.merge(combined, tmp_path / "merged")
    base = luthier.unmerge(merged, combined, tmp_path / "base")
    plain = luthier.unmerge(luthier.merge(first.output_path, tmp_path / "one"), first.artifact, tmp_path / "plain")
    for folder in (combined, merged):
        text = card_of(folder)
        assert "# llama, with 2 adapters combined by cat\n" in text
        assert f"- adapter: `adapter` of run `{first.run_id}`, weight 0.7\n" in text
        assert f"- adapter: `adapter` of run `{second.run_id}`, weight -0.2\n" in text
        assert "| adapter | `lora` |" in text
    for folder in (base, plain):
        assert "# llama, with an adapter taken out of it again\n" in card_of(folder)
        assert "- weights: bit for bit those of the base model\n" in card_of(folder)
        assert "## Parts" not in card_of(folder) and "lora" not in card_of(folder)
        note = json.loads((folder / "luthier.json").read_text())
        assert (note["adapter"], note["prompts"], note["stop_tokens"], note["progress"]) == (
            {"name": "none"}, "chat", [], None)  # fmt: skip
    assert f"- taken out: `adapter` of run `{first.run_id}`\n" in card_of(plain)
    for folder in (combined, merged, base, plain):
        text = card_of(folder)
        assert not {
            said for said in ("in run", "trained with", "2 steps", "| loss", "adamw", "## Again") if said in text
        }
        assert f"Made by Luthier {luthier.__version__}.\n" in text and "torch 2" in text
        assert json.loads((folder / "luthier.json").read_text())["run_id"] is None
    assert isinstance(luthier.generate(plain, "1 and", max_new_tokens=2), str)


def test_the_card_and_the_note_of_a_merged_run_keep_its_version_base_and_template(pair, tmp_path):
    run = pair[0]
    merged = luthier.merge(run.output_path, tmp_path / "merged")
    before, after = (json.loads((folder / "luthier.json").read_text()) for folder in (run.artifact, merged))
    kept = ("luthier", "base", "format", "chat_template_hash", "run_id", "card")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert before["chat_template_hash"] and before["base"]
    text = card_of(merged)
    assert f"Made by Luthier {luthier.__version__} in run `{run.run_id}`." in text
    assert f"(`{before['base']}` over its files)" in text and "2 steps" in text


def test_a_merge_upon_another_folder_of_the_base_names_that_ones_hash(pair, model_folder, tmp_path):
    other = shutil.copytree(model_folder, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    merged = luthier.merge(pair[0].output_path, tmp_path / "merged", base=str(other))
    prints = [json.loads((folder / "luthier.json").read_text())["base"] for folder in (pair[0].artifact, merged)]
    assert prints[0] != prints[1] and f"(`{prints[1]}` over its files)" in card_of(merged)
    assert json.loads((merged / "luthier.json").read_text())["model"]["name_or_path"] == str(other)
    assert other.name in card_of(merged)


def test_an_adapter_without_a_note_is_not_unmerged(pair, model_folder, tmp_path):
    bare = shutil.copytree(pair[0].artifact, tmp_path / "bare")
    (bare / "luthier.json").unlink()
    status, said = run_command("unmerge", model_folder, bare, "--output-dir", tmp_path / "base", "--json")
    error = json.loads(said)["error"]
    assert (status, error["code"], error["where"]) == (2, "artifact-not-found", str(bare))
    assert "luthier.json" in error["problem"] and not (tmp_path / "base").exists()


@pytest.mark.parametrize("verb", ["combine", "merge", "unmerge"])
def test_what_stands_where_a_result_would_go_is_refused_before_any_work(pair, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    project = tmp_path / "proj"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    given = [run.artifact for run in pair][: 1 if verb == "merge" else 2]
    places = {".": ("path-unwritable", "output_dir"), "proj": ("run-folder-other", "proj")}
    for folder, (code, where) in places.items():
        status, said = run_command(verb, *given, "--output-dir", folder, "--json")
        error = json.loads(said)["error"]
        assert (status, error["code"], error["where"]) == (2, code, where)
        assert error["remedy"]
    assert sorted(path.name for path in project.iterdir()) == ["config.json", "src"]


def test_a_merge_that_was_rounded_gives_the_base_back_bit_for_bit(pair, model_folder, tmp_path):
    merged = luthier.merge(pair[0].output_path, tmp_path / "merged", save_dtype="bfloat16")
    back = load_file(luthier.unmerge(merged, pair[0].output_path, tmp_path / "base") / "model.safetensors")
    assert all(
        torch.equal(back[name], tensor) for name, tensor in load_file(model_folder / "model.safetensors").items()
    )


def test_a_merged_model_within_an_adapters_folder_is_neither_replaced_nor_pushed_with_it(pair, tmp_path):
    folders = [run.artifact for run in pair]
    made = luthier.combine(folders, tmp_path / "made")
    merged = luthier.merge(made, made / "merged")
    with pytest.raises(LuthierError) as caught:
        luthier.combine(folders, made, method="cat")
    assert caught.value.code == "run-folder-other" and (merged / "model.safetensors").is_file()
    files = luthier.push(made, "me/made", dry_run=True).files
    assert "adapter_model.safetensors" in files and not any(name.startswith("merged") for name in files)


@pytest.mark.parametrize(
    "adapter", [pytest.param({"name": "dora"}, marks=pytest.mark.slow), {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_that_replaces_what_it_changes_is_not_unmerged(train_adapter, tmp_path, adapter):
    run = train_adapter(0, adapter=adapter)
    merged = luthier.merge(run.output_path, tmp_path / "merged")
    with pytest.raises(LuthierError) as caught:
        luthier.unmerge(merged, run.output_path, tmp_path / "base")
    assert caught.value.code == "artifact-unmergeable" and not (tmp_path / "base").exists()


def logits_of(loaded):
    with torch.no_grad():
        loaded.model.set_attn_implementation("sdpa")
        return loaded.model(input_ids=torch.tensor([[5, 6, 7]])).logits


def test_adapters_swap_over_one_base_in_memory(pair, train_adapter, tmp_path):
    first = luthier.load(pair[0].output_path, device="cpu")
    second = first.with_adapter(pair[1].output_path)
    alone = [luthier.load(run.output_path, device="cpu") for run in pair]
    for swapped, own in zip((first, second), alone, strict=True):
        assert torch.equal(logits_of(swapped), logits_of(own))
    shared = {p.data_ptr() for p in first.model.parameters()} & {p.data_ptr() for p in second.model.parameters()}
    assert len(shared) >= len(list(AutoModelForCausalLM.from_config(first.model.config).parameters())) - 2
    with first.disabled(), second.disabled():
        assert torch.equal(logits_of(first), logits_of(second))
    assert first.generate("1 and", max_new_tokens=3) == luthier.generate(pair[0].output_path, "1 and", max_new_tokens=3)
    in_place = train_adapter(2, adapter={"name": "lora", "modules_to_save": ["norm"], "bias": "none"})
    before = logits_of(first)
    third = second.with_adapter(in_place.artifact)
    assert not torch.equal(logits_of(third), before) and torch.equal(logits_of(first), before)


def test_an_adapter_of_another_base_is_not_put_over_this_one(pair, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair[1].artifact, other)
    note = json.loads((other / "luthier.json").read_text())
    (other / "luthier.json").write_text(json.dumps({**note, "base": "0" * 16}))
    with expect_error("artifact-mismatch", "other"):
        luthier.load(pair[0].artifact, device="cpu").with_adapter(other)


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, as huggingface_hub's client asks it; what came is in `commits`."""
    commits = []

    def answer(request):
        if request.path.endswith("/repos/create"):
            return Reply(body={"url": f"{server.url}/me/made", "name": "me/made"})
        if "/preupload/" in request.path:
            asked = json.loads(request.body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return Reply(body={"files": modes})
        if "/commit/" in request.path:
            commits.extend(json.loads(line) for line in request.body.splitlines() if line.strip())
            return Reply(body={"commitUrl": f"{server.url}/me/made/commit/1", "commitOid": "1" * 40, "success": True})
        return Reply(body={"id": "me/made", "siblings": [], "sha": "1" * 40, "private": True})

    server = LoopbackServer(answer)
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with server.running():
        server.commits = commits
        yield server


def test_a_dry_run_lists_what_would_be_sent_and_asks_nothing(pair, hub):
    status, said = run_command("push", pair[0].output_path, "me/made", "--dry-run", "--json")
    assert status == 0 and KEY not in said
    sent = json.loads(said)
    assert {WEIGHTS, "adapter_config.json", "luthier.json"} <= set(sent["files"]) and sent["url"] is None
    assert sent["files"][WEIGHTS] == (pair[0].artifact / WEIGHTS).stat().st_size and not hub.requests


def test_a_push_sends_every_file_and_says_no_key(pair, hub):
    status, said = run_command("push", pair[0].artifact, "me/made", "--json")
    assert status == 0, said
    sent = {line["value"]["path"] for line in hub.commits if line["key"] == "file"}
    assert sent == {path.name for path in pair[0].artifact.iterdir()} == set(json.loads(said)["files"])
    assert KEY not in said and json.loads(said)["private"] is True


def test_what_a_hub_refuses_is_told_without_the_key(pair, hub):
    hub.answer = lambda request: Reply(status=403, body={"error": f"no rights for {KEY}"})
    status, said = run_command("push", pair[0].artifact, "me/made", "--json")
    assert status == 2 and json.loads(said)["error"]["code"] == "provider-auth" and KEY not in said


def test_a_key_a_pickle_and_a_name_without_owner_are_refused(pair, tmp_path, monkeypatch):
    for name, content, said in (("notes.txt", KEY, "a key"), ("old.bin", "x", "pickle")):
        folder = tmp_path / name
        shutil.copytree(pair[0].artifact, folder)
        (folder / name).write_text(content)
        with pytest.raises(LuthierError, match=said) as caught:
            luthier.push(folder, "me/made", dry_run=True)
        assert KEY not in str(caught.value)
    with pytest.raises(LuthierError, match="OWNER/NAME"):
        luthier.push(pair[0].artifact, "made", dry_run=True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(LuthierError) as caught:
        luthier.push(pair[0].artifact, "me/made")
    assert caught.value.code == "credential-missing"
