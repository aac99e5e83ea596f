"""`luthier doctor`: what it finds, with torch and without."""

import json
import platform
import sys


def test_doctor_knows_versions_devices_threads_memory_and_disk(luthier):
    found = luthier("doctor", "--json").document
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["luthier"]
    assert found["devices"][0]["device"] == "cpu"
    assert found["threads"]["usable"] >= 1
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    assert found["disk"]["free_bytes"] > 0
    assert found["plugins"]["parts"] >= 10


def test_doctor_lists_each_failure_and_still_exits_with_zero(luthier, distribute):
    distribute("luthier-fails", "raise RuntimeError('no such thing')")
    result = luthier("doctor", "--json")
    assert result.status == 0
    assert any("luthier-fails" in f and "no such thing" in f for f in result.document["failures"])
    assert "no such thing" in luthier("doctor").stdout


def test_doctor_fits_eighty_columns(luthier, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = luthier("doctor")
    assert result.status == 0
    assert max(len(line) for line in result.stdout.splitlines() if "failure:" not in line) <= 80


def test_doctor_and_plugins_work_without_torch_and_say_what_to_install(bare):
    doctor = bare("doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    found = json.loads(doctor.stdout)
    assert "torch" not in found["versions"]
    assert found["failures"] == []
    assert 'pip install "luthier[local]"' in found["remedy"]
    assert {"torch", "transformers"} <= set(found["missing"])
    assert bare("plugins", "--check").returncode == 0


def test_a_torch_that_cannot_be_imported_is_a_failure_not_a_crash(luthier, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())
    assert any("torch" in f for f in luthier("doctor", "--json").document["failures"])
