"""Help: quick, light, and complete."""

import os
import subprocess
import sys

HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "numpy", "wandb", "mlflow", "openai"}
BOUND = 0.3  # seconds of CPU time, user and system, of the best of seven


def cpu_seconds(line):
    before = os.times()
    subprocess.run(line, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_takes_at_most_its_bound_of_cpu_time():
    best = min(cpu_seconds([sys.executable, "-m", "luthier", "--help"]) for _ in range(7))
    assert best <= BOUND


def test_help_loads_no_heavy_library():
    source = (
        "import sys\n"
        "from luthier.cli import main\n"
        "sys.argv = ['luthier', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    assert "Usage: luthier" in result.stdout
    assert not HEAVY & set(result.stderr.split())


def test_help_lists_every_verb(luthier):
    text = luthier("--help").stdout
    for verb in ("demo", "train", "plan", "inspect", "generate", "merge", "plugins", "doctor", "new-plugin"):
        assert any(line.split()[:1] == [verb] for line in text.splitlines()), verb


def test_no_argument_is_help(luthier):
    assert luthier().stdout == luthier("--help").stdout
    assert luthier().status == 0
