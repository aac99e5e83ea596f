"""`luthier plugins`: the list, one part, the check."""

import sys

import pytest

BUILTIN = {
    ("adapter", "full"),
    ("loss", "sft"),
    ("optimizer", "adamw"),
    ("optimizer", "sgd"),
    ("quantizer", "none"),
    ("provider", "local"),
    ("callback", "jsonl"),
    ("callback", "progress"),
    ("callback", "plot"),
    ("callback", "early_stopping"),
    ("callback", "profiler"),
    ("callback", "gpu_safety"),
}


def row(result, name):
    return next(r for r in result.document["plugins"] if r["name"] == name)


def test_every_builtin_part_is_listed_with_its_distribution_and_version(luthier):
    rows = luthier("plugins", "--json").document["plugins"]
    ours = {(r["kind"], r["name"]) for r in rows if r["distribution"] == "luthier"}
    assert ours == BUILTIN
    assert all(r["version"] and r["summary"] and r["state"] == "ok" for r in rows if r["distribution"] == "luthier")


def test_the_table_has_a_line_for_each_part(luthier):
    result = luthier("plugins")
    assert result.status == 0
    for kind, name in BUILTIN:
        assert any(line.split()[:2] == [kind, name] for line in result.stdout.splitlines())


@pytest.mark.parametrize("width", [80, 100])
def test_a_line_is_never_wider_than_the_terminal(luthier, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = luthier("plugins").stdout.splitlines()
    assert max(len(line) for line in lines) <= width
    for row in luthier("plugins", "--json").document["plugins"]:
        assert any(line.split()[:3] == [row["kind"], row["name"], row["distribution"]] for line in lines)
        assert any(row["summary"][:25] in line for line in lines)


def test_an_installed_distribution_is_listed(luthier, distribute, offering):
    distribute("luthier-outside", offering("outside"))
    found = row(luthier("plugins", "--json"), "outside")
    assert (found["distribution"], found["version"], found["state"]) == ("luthier-outside", "1.0", "ok")


def test_a_name_of_two_distributions_is_a_conflict_that_names_the_other(luthier, distribute, offering):
    distribute("luthier-one", offering("twice"))
    distribute("luthier-two", offering("twice"))
    result = luthier("plugins", "--json")
    assert row(result, "twice")["state"] == "conflict"
    assert "luthier-two" in row(result, "twice")["reason"]
    assert "luthier-two" in luthier("plugins").stdout


def test_a_plugin_that_fails_to_import_is_broken_with_its_cause_and_others_go_on(luthier, distribute, offering):
    distribute("luthier-fails", "raise RuntimeError('no such thing')")
    distribute("luthier-works", offering("works"))
    result = luthier("plugins", "--json")
    broken = row(result, "fails")
    assert (broken["state"], broken["kind"], broken["distribution"]) == ("broken", None, "luthier-fails")
    assert "no such thing" in broken["reason"]
    assert row(result, "works")["state"] == "ok"
    assert result.status == 0


def test_a_blocked_plugin_is_listed_as_blocked(luthier, distribute, offering, monkeypatch):
    monkeypatch.setenv("LUTHIER_DISABLE_PLUGINS", "luthier-outside")
    distribute("luthier-outside", offering("outside"))
    assert row(luthier("plugins", "--json"), "outside")["state"] == "blocked"


def test_a_part_that_conflicts_with_packing_is_unsupported_with_the_reason(luthier, distribute, offering):
    distribute("luthier-alone", offering("alone").replace("options=Options", "options=Options, conflicts='packing'"))
    found = row(luthier("plugins", "--json"), "alone")
    assert found["state"] == "unsupported"
    assert "packing" in found["reason"]
    assert luthier("plugins", "--check").status == 0


def test_show_gives_type_default_bounds_and_meaning_of_each_option(luthier, distribute, offering):
    distribute("luthier-outside", offering("outside"))
    result = luthier("plugins", "show", "optimizer", "outside", "--json")
    momentum, names = result.document["options"]
    assert momentum == {
        "name": "momentum",
        "type": "float",
        "default": 0.9,
        "required": False,
        "low": 0.0,
        "high": 1.0,
        "choices": None,
        "help": "How much of the last step is kept.",
    }
    assert names["type"] == "list[str] | none"
    assert {"needs", "provides", "conflicts"} <= result.document.keys()
    assert result.document["distribution"] == "luthier-outside"


def test_show_prints_types_in_brackets_as_they_are(luthier, distribute, offering):
    distribute("luthier-outside", offering("outside"))
    text = luthier("plugins", "show", "optimizer", "outside").stdout
    assert "list[str] | none" in text
    assert "0 to 1" in text
    assert "luthier-outside 1.0" in text


def test_show_says_what_the_record_of_a_kind_declares(luthier):
    document = luthier("plugins", "show", "quantizer", "none", "--json").document
    assert document["declares"] == {"tolerance": 0.0, "trains": False, "mergeable": True}
    assert "trains: False" in luthier("plugins", "show", "quantizer", "none").stdout


def test_show_of_an_unknown_kind_or_name_says_the_nearest(luthier):
    kind = luthier("plugins", "show", "optimiser", "adamw", "--json")
    name = luthier("plugins", "show", "optimizer", "adamv", "--json")
    assert (kind.status, kind.document["error"]["code"]) == (2, "part-unknown")
    assert "'optimizer'" in kind.document["error"]["remedy"]
    assert (name.status, name.document["error"]["code"]) == (2, "part-unknown")
    assert "'adamw'" in name.document["error"]["remedy"]


def test_show_of_a_part_that_is_not_installed_says_what_would_bring_it(luthier, monkeypatch, tmp_path):
    from luthier.plugins import catalogue

    (tmp_path / "catalogue.json").write_text('{"adapter": {"someday": "luthier-someday"}}')
    monkeypatch.setattr(catalogue, "FILE", tmp_path / "catalogue.json")
    error = luthier("plugins", "show", "adapter", "someday", "--json").document["error"]
    assert "pip install luthier-someday" in error["remedy"]


def test_check_passes_where_all_is_sound(luthier, distribute, offering):
    distribute("luthier-outside", offering("outside"), requires=["luthier>=0.1", "luthier>=9; extra == 'later'"])
    result = luthier("plugins", "--check")
    assert result.status == 0, result.stdout
    assert "sound" in result.stdout


def test_check_fails_on_a_broken_plugin(luthier, distribute):
    distribute("luthier-fails", "raise RuntimeError('no such thing')")
    result = luthier("plugins", "--check")
    assert result.status == 1
    assert "luthier-fails" in result.stdout
    assert "no such thing" in result.stdout


def test_check_fails_on_a_conflict(luthier, distribute, offering):
    distribute("luthier-one", offering("twice"))
    distribute("luthier-two", offering("twice"))
    assert luthier("plugins", "--check").status == 1


def test_check_fails_on_a_part_whose_module_does_not_exist(luthier, distribute, offering):
    distribute("luthier-outside", offering("outside", build="luthier_outside_gone.part:Part"))
    result = luthier("plugins", "--check", "--json")
    assert result.status == 1
    assert "luthier_outside_gone.part" in result.document["failures"][0]["reason"]


def test_check_does_not_import_a_plugin_made_for_another_luthier(luthier, distribute):
    distribute("luthier-newer", "raise RuntimeError('imported')", requires=["luthier>=99"])
    result = luthier("plugins", "--check", "--json")
    (failure,) = result.document["failures"]
    assert result.status == 1
    assert failure["distribution"] == "luthier-newer"
    assert "luthier>=99" in failure["reason"]
    assert "luthier_newer" not in sys.modules


def test_check_reports_a_requirement_that_cannot_be_read(luthier, distribute, offering):
    distribute("luthier-odd", offering("odd"), requires=["luthier >=> 1"])
    (failure,) = luthier("plugins", "--check", "--json").document["failures"]
    assert "'luthier >=> 1' cannot be read" in failure["reason"]


def test_plugins_in_a_process_of_its_own_prints_one_document(command):
    result = command("plugins", "--json")
    assert result.returncode == 0
    assert result.stdout.startswith("{")
    assert result.stderr == ""
