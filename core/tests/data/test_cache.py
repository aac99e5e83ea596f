"""The cache: the same examples, found by the content of everything that makes them, and by nothing less."""

import json
import os
import resource
import shutil
import signal

import attrs
import numpy as np
import pytest
from luthier.data import cache
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import prepare_data
from luthier.data.read import content_hash as identity
from luthier.disk import cache_folder
from luthier.recipe.schema import Data, Source
from luthier.testing.worlds import TEMPLATE, tiny_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 100)  # rows enough for a test
    return tmp_path / "cache" / "examples"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(20)))
    return path


def row(i):
    return {"question": f"{i} and {i}?", "answer": f"{2 * i}" * (i % 4), "other": f"{i}"}


COLUMNS = {"prompt": "question", "completion": "answer"}


def data_of(path, **options):
    source = {"columns": COLUMNS, **options.pop("source", {})}
    return Data(train=[Source(path=str(path), **source)], **{"unsupervised": "drop", **options})


def entries(folder):
    return sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []


def made(path, tokenizer=None, seed=0, **options):
    return prepare_data(data_of(path, **options), tokenizer or tiny_tokenizer(), seed=seed)


def plain(prepared):
    sets = [prepared.train] + ([prepared.validation] if prepared.validation is not None else [])
    return [s.fingerprint for s in sets], [s.where for s in sets], prepared.report.to_dict(), prepared.stop_tokens


@pytest.mark.parametrize(
    "options", [{}, {"validation": 0.2}, {"block_size": 16, "source": {"columns": {"text": "question"}}}]
)
def test_what_is_taken_from_the_cache_is_what_was_put_there(rows, folder, options):
    first, again = made(rows, **options), made(rows, **options)
    assert plain(again) == plain(first)
    assert len(entries(folder)) == 1
    one, other = first.train[3], again.train[3]
    assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.starts, other.starts)
    assert isinstance(again.train.input_ids, np.memmap)
    assert plain(made(rows, cache=False, **options)) == plain(first)


CHANGES = {
    "nothing": {},
    "max_length": {"max_length": 12},
    "overlong": {"max_length": 12, "overlong": "truncate"},
    "train_on": {"train_on": "all"},
    "unsupervised": {"unsupervised": "drop", "format": "prompt_completion"},
    "columns": {"source": {"columns": {"prompt": "other", "completion": "answer"}}},
    "template": {"source": {"columns": {}, "template": {"prompt": "{question}", "completion": "{answer}."}}},
    "max_rows": {"source": {"max_rows": 7}},
    "blocks": {"block_size": 9, "source": {"columns": {"text": "question"}}},
    "validation": {"validation": 0.1},
    "another validation": {"validation": 0.3},
    "text_unit": {"text_unit": "line"},
}


def test_another_option_of_the_data_is_another_entry(rows, folder):
    for number, options in enumerate(CHANGES.values(), 1):
        assert plain(made(rows, **options)) == plain(made(rows, cache=False, **options))
        assert len(entries(folder)) == number
    for options in CHANGES.values():
        made(rows, **options)
    assert len(entries(folder)) == len(CHANGES)


def test_how_the_rows_are_read_is_not_part_of_what_they_are(rows, folder):
    made(rows)
    made(rows, num_proc=2)
    made(rows, shuffle_buffer=5)
    made(rows, seed=4)  # nothing is drawn
    assert len(entries(folder)) == 1
    made(rows, seed=4, validation=0.2)
    made(rows, seed=5, validation=0.2)
    assert len(entries(folder)) == 3


def test_changed_rows_are_made_again_even_under_the_same_name_size_and_time(rows, folder):
    before = rows.stat()
    first = made(rows)
    rows.write_text(rows.read_text().replace("3 and 3?", "3 und 3?"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows.stat().st_size == before.st_size
    again = made(rows)
    assert again.train.fingerprint != first.train.fingerprint
    assert again.train.fingerprint == made(rows, cache=False).train.fingerprint


def test_rows_of_another_file_keep_their_own_places(rows, folder, tmp_path):
    made(rows)
    shutil.copy(rows, tmp_path / "copy.jsonl")
    assert made(tmp_path / "copy.jsonl").train.where[0].startswith(str(tmp_path / "copy.jsonl"))


def test_another_file_under_a_glob_is_seen(rows, folder, tmp_path):
    assert len(made(tmp_path / "*.jsonl").train) == 15
    shutil.copy(rows, tmp_path / "sows.jsonl")
    assert len(made(tmp_path / "*.jsonl").train) == 30


def tokenizers():
    """One, and others that differ in one thing each."""
    yield tiny_tokenizer()
    more = tiny_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    yield more
    merged = tiny_tokenizer()
    merged.add_tokens(["and"])
    yield merged
    ended = tiny_tokenizer()
    ended.eos_token = "<|user|>"
    yield ended
    yield tiny_tokenizer(TEMPLATE.replace("eos_token", "bos_token"))


def test_another_tokenizer_or_template_is_another_entry(rows, folder):
    for number, tokenizer in enumerate(tokenizers(), 1):
        assert plain(made(rows, tokenizer)) == plain(made(rows, tokenizer, cache=False))
        assert len(entries(folder)) == number


def test_the_template_of_the_recipe_counts_by_its_text(rows, folder, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    made(rows, chat_template=str(path))
    made(rows, chat_template=TEMPLATE)
    assert len(entries(folder)) == 1
    path.write_text(TEMPLATE.replace("<|assistant|>", "<|tool|>"))
    made(rows, chat_template=str(path))
    assert len(entries(folder)) == 2


def test_a_template_that_writes_the_date_counts_with_the_day(rows, folder, monkeypatch):
    dated = tiny_tokenizer("{{ strftime_now('%d') }}" + TEMPLATE)
    made(rows, dated)
    monkeypatch.setattr(cache.time, "strftime", lambda form: "2031-01-02 03:04:05")
    made(rows, dated)
    assert len(entries(folder)) == 2


def test_another_version_of_the_code_is_another_entry(rows, folder, monkeypatch):
    made(rows)
    code = identity.code_hash()
    monkeypatch.setattr(identity.metadata, "version", lambda name: "99")
    identity.code_hash.cache_clear()
    try:
        assert identity.code_hash() != code
        made(rows)
    finally:
        identity.code_hash.cache_clear()
    assert len(entries(folder)) == 2


def test_rows_in_python_are_known_by_their_values(folder):
    rows = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(20)]
    options = Data(train=[], unsupervised="drop")
    first = prepare_data(options, tiny_tokenizer(), seed=0, given=rows)
    assert plain(prepare_data(options, tiny_tokenizer(), seed=0, given=[dict(r) for r in rows])) == plain(first)
    assert len(entries(folder)) == 1
    rows[4]["completion"] = "5"
    assert prepare_data(options, tiny_tokenizer(), seed=0, given=rows).train.fingerprint != first.train.fingerprint


def test_rows_that_cannot_be_told_apart_are_not_kept(folder):
    class Secret:
        def __repr__(self):
            return "same"

    rows = [{"prompt": f"{i}?", "completion": f"{i}", "more": Secret()} for i in range(20)]
    prepare_data(Data(train=[]), tiny_tokenizer(), seed=0, given=rows)
    assert not entries(folder)


def test_arrays_count_with_every_value(folder):
    for last in (7, 8):
        ids = np.arange(5, 2000) % 250
        ids[1000] = last
        prepare_data(Data(train=[]), tiny_tokenizer(), seed=0, given=[{"input_ids": ids}] * 2)
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "json", "empty"])
def test_a_damaged_entry_is_made_again_aloud(rows, folder, capsys, damage):
    first = made(rows)
    (entry,) = (folder / name for name in entries(folder))
    array = entry / "train.labels.npy"
    if damage == "flip":
        held = bytearray(array.read_bytes())
        held[-3] ^= 1
        array.write_bytes(held)
    elif damage == "cut":
        array.write_bytes(array.read_bytes()[:-8])
    elif damage == "gone":
        array.unlink()
    else:
        (entry / "entry.json").write_text("{" if damage == "json" else "{}")
    capsys.readouterr()
    assert plain(made(rows)) == plain(first)
    assert "damaged and made again" in capsys.readouterr().err
    assert cache.Entry(entry).read() is not None


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(rows, folder, capsys, tmp_path):
    (tmp_path / "cache").write_text("a file stands here")
    assert len(made(rows).train) == 15
    assert "not kept in the cache" in capsys.readouterr().err


@pytest.mark.parametrize("most", [600, 60_000])  # bytes of a file: less than a tokenizer's, less than the examples'
def test_a_disk_that_fills_up_leaves_nothing_half_written_and_does_no_harm(rows, folder, most):
    rows.write_text("".join(json.dumps(row(i)) + "\n" for i in range(2000)))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            status = 0 if len(made(rows).train) == 1500 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not entries(folder)


def test_a_few_rows_are_not_worth_it(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    made(rows)
    assert not (tmp_path / "cache").exists()


def test_what_was_not_used_for_the_longest_time_goes_first(rows, folder):
    oldest, middle, youngest = (newly(rows, folder, max_length) for max_length in (20, 30, 40))
    for age, name in ((300, oldest), (200, middle), (100, youngest)):
        os.utime(folder / name / "entry.json", (1e9 - age, 1e9 - age))
    size = sum(path.stat().st_size for path in (folder / youngest).iterdir())
    cache.prune(folder, 2 * size + 50, but=folder / youngest)
    assert entries(folder) == sorted([middle, youngest])
    made(rows, max_length=30)  # used again
    cache.prune(folder, size + 50, but=folder / middle)
    assert entries(folder) == [middle]
    cache.prune(folder, 1, but=folder / middle)
    assert entries(folder) == [middle]


def newly(rows, folder, max_length):
    """The name of the entry that this length adds."""
    before = {*entries(folder)}
    made(rows, max_length=max_length)
    (name,) = {*entries(folder)} - before
    return name


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LUTHIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "luthier"


def test_every_option_of_the_data_is_part_of_the_key_or_known_not_to_matter():
    names = {field.name for field in attrs.fields(Data)}
    assert {*cache.WITHOUT} < names
    assert names - {*cache.WITHOUT} == {
        "format", "text_unit", "max_length", "overlong", "train_on", "unrendered", "unsupervised", "block_size",
        "chat_template_kwargs", "bad_rows", "max_bad_rows",
    }  # fmt: skip


def test_pairs_with_their_columns_and_numbers_come_back_from_the_cache_as_they_were(tmp_path, folder):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"q{i}" * 40, "chosen": "a" * 300, "rejected": f"b{i}" * 99, "margin": i / 4} for i in range(500)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = Wanted(kind="preference", columns={"margin": "float"})
    first, again = (
        prepare_data(data_of(path, source={"columns": {}}, validation=0.1), tiny_tokenizer(), seed=0, wanted=w)
        for w in (wanted, wanted)
    )
    assert len(entries(folder)) == 1 and isinstance(again.train.input_ids, np.memmap)
    assert plain(first) == plain(again)
    for one, other in zip(first.train, again.train, strict=True):
        assert (one.index, one.names, dict(one.columns)) == (other.index, other.names, dict(other.columns))
        assert one.columns == {"margin": one.index / 4}
    assert {e.index for e in first.train}.isdisjoint(e.index for e in first.validation)
    prepare_data(
        data_of(path, source={"columns": {}}, validation=0.1),
        tiny_tokenizer(),
        seed=0,
        wanted=Wanted(kind="preference"),
    )
    assert len(entries(folder)) == 2  # other columns, another entry
