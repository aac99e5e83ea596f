"""`luthier checkpoint`: asked of a run in another process, it comes back with the checkpoint, or says why there is none."""

import os
import signal
import subprocess
import sys
import threading

import luthier as api
import pytest
from luthier.checkpoint import folder as checkpoint
from luthier.runs.run_folder import read_folder
from luthier.runs.writing import save_requests as requests
from luthier.testing.worlds import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


class Elsewhere:
    """A run in a forked process, far from its end, which waits after its first step until it is let go."""

    def __init__(self, model, folder, **settings):
        self.folder = folder
        self.told, tell = os.pipe()
        hear, self.say = os.pipe()

        def wait(step):
            if step == 1:
                os.write(tell, b".")
                os.read(hear, 1)

        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.say)
            rows = [{"prompt": f"{i} and", "completion": f"{i}"} for i in range(8)]
            shared = {
                "model": str(model),
                "data": rows,
                "global_batch_size": 4,
                "output_dir": folder,
                "torch_compile": False,
            }
            try:
                api.train(**{**shared, "max_steps": 10**6, "exact_callbacks": [api.on(step_ended=wait)], **settings})
            finally:
                os._exit(0)
        os.close(tell)
        os.close(hear)
        assert os.read(self.told, 1) == b"."

    def go(self):
        os.write(self.say, b".")

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def elsewhere(model, tmp_path):
    begun = []

    def begin(**settings):
        begun.append(Elsewhere(model, tmp_path / "run", **settings))
        return begun[-1]

    yield begin
    for run in begun:
        os.close(run.say)
        try:
            run.kill()
        except ProcessLookupError:
            """The test has ended it."""


def test_a_run_is_asked_for_a_checkpoint_and_the_command_waits_until_it_is_there(luthier, elsewhere):
    run = elsewhere()
    run.go()
    done = luthier("checkpoint", run.folder, "--json")
    assert done.status == 0
    path = checkpoint.list_checkpoints(run.folder)[-1]
    assert done.document == {"run": str(run.folder), "step": checkpoint.step_of(path), "checkpoint": str(path)}
    assert checkpoint.load_checkpoint(path)["tally"]["step"] == checkpoint.step_of(path)
    assert not requests.save_pending(run.folder)
    again = luthier("checkpoint", run.folder)
    assert again.stdout.strip() == f"checkpoint: {checkpoint.list_checkpoints(run.folder)[-1]}"
    assert len(checkpoint.list_checkpoints(run.folder)) == 2


def test_a_run_that_does_not_answer_in_time_is_asked_no_longer(luthier, elsewhere):
    run = elsewhere()
    done = luthier("checkpoint", run.folder, "--timeout", "0.1", "--json")
    assert (done.status, done.document["error"]["code"]) == (75, "run-silent")
    assert "--timeout" in done.document["error"]["remedy"]
    assert not requests.save_pending(run.folder)


def test_a_run_that_is_killed_before_it_answers_is_said_to_be(luthier, elsewhere):
    run = elsewhere()
    threading.Timer(0.1, run.kill).start()
    done = luthier("checkpoint", run.folder, "--json")
    assert (done.status, done.document["error"]["code"]) == (2, "run-not-running")
    assert "the run is killed" in done.document["error"]["message"]
    assert not (run.folder / requests.ASKED).exists()


def test_a_run_that_is_over_or_none_at_all_is_told_apart(luthier, model, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    api.train(model=str(model), data=rows, output_dir=tmp_path / "done", exact_callbacks=[])
    done = luthier("checkpoint", tmp_path / "done", "--json")
    assert done.document["error"]["code"] == "run-not-running"
    assert "It is done" in done.document["error"]["remedy"]
    assert read_folder(tmp_path / "done").state == "completed"
    assert luthier("checkpoint", tmp_path / "nowhere", "--json").document["error"]["code"] == "run-not-found"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text("{")
    assert luthier("checkpoint", tmp_path / "damaged", "--json").document["error"]["code"] == "run-not-found"


def test_asking_loads_no_torch(tmp_path):
    """It waits in a process of its own, perhaps on a machine that has little else."""
    (tmp_path / "run.json").write_text('{"run_id": "20260102-030405-abcd", "state": "running"}')
    source = (
        "import sys\nfrom luthier.cli import main\n"
        f"sys.argv = ['luthier', 'checkpoint', {str(tmp_path)!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    print(end.code, *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    status, *loaded = result.stderr.splitlines()[-1].split()
    assert (status, "luthier" in loaded) == ("2", True)
    assert "the run is killed" in result.stderr
    assert not {"torch", "transformers", "numpy"} & set(loaded)
