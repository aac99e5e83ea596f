"""A module is imported while the packages by which it would fetch something are hidden, which leaves no trace."""

import logging
import sys

import pytest
from luthier.model.offline_import import hide_package, import_offline


def test_a_hidden_package_is_found_again_afterwards(tmp_path, monkeypatch):
    (tmp_path / "fetching_package.py").write_text("inner = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):  # before it has been imported, and after
        with hide_package("fetching_package"), pytest.raises(ModuleNotFoundError):
            import fetching_package
        import fetching_package

        assert sys.modules["fetching_package"] is fetching_package
    monkeypatch.delitem(sys.modules, "fetching_package")


def test_a_library_that_would_fetch_finds_nothing_to_fetch_with_and_is_not_heard_to_complain(
    tmp_path, monkeypatch, caplog
):
    (tmp_path / "kernels.py").write_text("raise SystemExit('asked for a binary')\n")
    library = tmp_path / "fetching_library.py"
    library.write_text(
        "import logging\ntry:\n    import kernels\nexcept ImportError:\n"
        "    logging.getLogger('bitsandbytes.backends.cpu.ops').warning('install kernels')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = import_offline("fetching_library")
    assert module is sys.modules["fetching_library"]
    assert not caplog.records
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").disabled
    monkeypatch.delitem(sys.modules, "fetching_library")
