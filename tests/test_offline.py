"""Local work asks nothing of the network and writes where it was told; place, time zone and locale do not matter."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

SESSION = """
import json, os, sys
asked, written = [], []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        asked.append(f"{event} {arguments[1:]}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(os.path.abspath(os.fsdecode(arguments[0])))
    elif event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # relative to an open folder, as rmtree removes
        written.append(os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(arguments[0])))
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        written.extend(os.path.abspath(os.fsdecode(a)) for a in arguments if isinstance(a, (str, bytes)))

sys.addaudithook(watch)
import luthier
import torch
torch.set_num_threads(1)
model, data, out = sys.argv[1:]
shared = {"model": model, "data": data, "adapter": "lora", "max_steps": 2}
luthier.plan(**shared)
luthier.inspect(model=model, data=data)
run = luthier.train(**shared, output_dir=out, merge=True, exact_callbacks=["jsonl", "plot", "progress", "tensorboard"])
run.generate("1?", max_new_tokens=2)
luthier.generate(out, "1?", max_new_tokens=2)
luthier.merge(out, out + "/again")
print(json.dumps({"asked": asked, "written": written}))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory, model_folder, data_file):
    """A session in a home and a working directory of its own: what it asked, what it wrote, and where it might."""
    folder = tmp_path_factory.mktemp("session")
    places = {name: folder / name for name in ("home", "work", "out", "temporary")}
    for place in places.values():
        place.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "LUTHIER_", "MPLCONFIG"))}
    environment |= {"HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "OMP_NUM_THREADS": "1",
                    "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    words = [sys.executable, "-c", SESSION, model_folder, data_file, places["out"] / "run"]
    done = subprocess.run(words, cwd=places["work"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**places, **json.loads(done.stdout.splitlines()[-1])}


def test_nothing_is_asked_of_the_network(session):
    assert session["asked"] == []


def test_nothing_is_written_but_into_the_output_the_cache_and_temporary_folders(session):
    torchs = f"{tempfile.gettempdir()}/torchinductor_"  # torch makes it on import, wherever TMPDIR points
    probe = f"{session['work']}/probe-"  # filelock's, named relative to a folder of its own: the next test sees none
    places = (f"{session[name]}/" for name in ("out", "temporary"))
    allowed = (*places, f"{session['home']}/.c", "/dev/", torchs, probe)
    assert [path for path in session["written"] if not path.startswith(allowed)] == []
    assert any(path.startswith(str(session["out"])) for path in session["written"])


def test_the_working_directory_stays_empty_and_nothing_temporary_is_left(session):
    assert list(session["work"].iterdir()) == []
    assert list(session["temporary"].iterdir()) == []
    assert {path.name for path in session["home"].iterdir()} <= {".cache", ".config"}


ROWS = [{"prompt": f"Wie heißt {n} auf 日本語? ", "completion": f"数字{n} – «{n}»"} for n in range(12)]


def train(folder, data, model, **variables):
    """`luthier train` in a process of its own; its numbers."""
    words = [
        "train",
        "--model",
        model,
        "--data",
        data,
        "--adapter",
        "lora",
        "--max-steps",
        "2",
        "--output-dir",
        folder / "run",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "luthier", *words, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-3000:]
    return json.loads(done.stdout.decode("utf-8"))["loss_history"]


def test_time_zone_and_locale_change_nothing(tmp_path, model_folder):
    data = tmp_path / "zeilen.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")
    here = train(tmp_path / "here", data, model_folder, TZ="UTC", LC_ALL="C.UTF-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    there = train(tmp_path / "there", data, model_folder, TZ="Asia/Kathmandu", **plain)
    assert here == there
