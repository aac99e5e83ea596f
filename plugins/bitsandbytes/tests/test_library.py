"""The import of bitsandbytes looks at no network, and leaves no trace."""

import os
import subprocess
import sys


def test_bitsandbytes_is_imported_without_asking_the_package_that_fetches(tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('asked for a binary')\n")
    code = "import os, sys, luthier_bitsandbytes.library; print('kernels' in sys.modules, os.environ.get('HF_HUB_OFFLINE'))"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    paths = [str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False None\n", "")
