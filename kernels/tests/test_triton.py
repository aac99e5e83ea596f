"""The Triton kernels, run by Triton's interpreter in a process of its own, as the switch is read at import."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "interpreted"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("checks", sorted(p.name for p in CHECKS.glob("check_*.py")))
def test_kernels_agree_with_their_references_under_the_interpreter(checks):
    words = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*words, str(CHECKS / checks)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
