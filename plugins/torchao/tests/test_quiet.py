"""A library that is only there is not heard."""

import subprocess
import sys


def test_the_import_of_torchao_says_nothing_once_luthier_loads_a_model():
    code = "import luthier.model, luthier_torchao.library, torchao; print(torchao.__version__ >= '0.18')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
