"""A library that is only there is not heard."""

import subprocess
import sys


def test_the_import_of_torchao_says_nothing_once_the_plugin_is_known():
    code = "import luthier_torchao, luthier_torchao.library, torchao; print(torchao.__version__ >= '0.18')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
