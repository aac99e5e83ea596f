"""Compare two commits bit for bit: `python -m tests.same_bits COMMIT COMMIT` trains with both and exits 1 where a bit differs.

The demo and the recipes of docs/recipes whose data is here take a few steps with the seed of each; loss histories, adapters and
merged files must be equal. Only the sources come from the commits, the installed libraries are this environment's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
BESIDE: Final = ROOT.parents[0] / "shared" / "data"
COMPARED: Final = (
    "loss",
    "norm",
    "rate",
    "step",
    "token",
    "accuracy",
    "reward",
)  # in names of numbers; the rest is clocks
RECIPES: Final = ("bitnet", "cl_tasks", "dpo", "gsm8k", "qlora")
STEPS: Final = 3
TRAIN: Final = (
    "import sys, luthier; luthier.train(sys.argv[1], output_dir=sys.argv[2], max_steps=int(sys.argv[3]),"
    " max_eval_batches=1, eval_on_start=True)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commits", nargs=2)
    parser.add_argument(
        "--recipes", nargs="*", default=RECIPES, help="names of files in docs/recipes; the demo always runs"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before, after = (
            digest_commit(commit, Path(folder) / side, arguments.recipes, arguments.steps)
            for side, commit in zip(("before", "after"), arguments.commits, strict=True)
        )
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    print(f"{len(before)} loss histories and files, {len(differing)} differ", *differing, sep="\n  ")
    return bool(differing)


def digest_commit(commit: str, folder: Path, recipes: list[str], steps: int) -> dict[str, str]:
    """Train with the sources of a commit in a worktree of its own, and return a digest for each thing that is compared."""
    tree, runs = folder / "tree", folder / "runs"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
    try:
        environment = own_environment(tree, folder / "cache")
        demo = ["-m", "luthier", "demo", "--folder", str(runs / "demo"), "--max-steps", str(steps), "--json"]
        run_python(demo, environment)
        for name in recipes:
            recipe = tree / "docs/recipes" / f"{name}.yaml"
            run_python(["-c", TRAIN, str(recipe), str(runs / name), str(steps)], environment)
        return digest_runs(runs)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def own_environment(tree: Path, cache: Path) -> dict[str, str]:
    """Return the environment in which Python imports the members of `tree` before those that are installed."""
    sources = [str(path.parent / "src") for path in tree.glob("*/pyproject.toml")]
    sources += [str(path.parent / "src") for path in tree.glob("*/*/pyproject.toml")]
    data = os.environ.get("LUTHIER_DATA", str(BESIDE))
    given = {"PYTHONPATH": os.pathsep.join(sources), "LUTHIER_CACHE": str(cache), "LUTHIER_DATA": data}
    return {**os.environ, "OMP_NUM_THREADS": "1", **given}


def run_python(arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *arguments], check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"python {' '.join(arguments)}\n{done.stderr}")


def digest_runs(runs: Path) -> dict[str, str]:
    """Return the digest of each run's losses and of each file with tensors, by its name below `runs`."""
    tensors = {path: path.read_bytes() for path in runs.rglob("*.safetensors")}
    losses = {path: json.dumps(read_numbers(path)).encode() for path in runs.rglob("metrics.jsonl")}
    return {
        str(path.relative_to(runs)): hashlib.sha256(content).hexdigest()
        for path, content in {**tensors, **losses}.items()
    }


def read_numbers(path: Path) -> list[dict[str, object]]:
    """Return the lines of a metrics.jsonl without what the clock and the machine decide."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if is_compared(name)} for line in lines]


def is_compared(name: str) -> bool:
    return "second" not in name and any(part in name for part in COMPARED)


if __name__ == "__main__":
    sys.exit(main())
