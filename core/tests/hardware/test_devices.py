"""Devices: honoured or refused with the reason, and lost in the middle of a run."""

import luthier
import pytest
import torch
from luthier.errors import LuthierError
from luthier.hardware import devices
from luthier.runs.writing.record import read_record


def test_auto_is_a_device_that_is_here():
    assert str(devices.choose_device("auto")) in devices.list_devices()


@pytest.mark.parametrize("name", ["cpu", *devices.list_devices()])
def test_what_is_here_is_honoured(name):
    assert str(devices.choose_device(name)) == name
    torch.zeros(1, device=devices.choose_device(name))


@pytest.mark.parametrize("name", ["cuda:99", "mps" if torch.cuda.is_available() else "cuda", "tpu"])
def test_what_is_not_here_is_refused_with_what_is(name):
    with pytest.raises(LuthierError) as caught:
        devices.choose_device(name)
    assert caught.value.code == "device-unavailable"
    assert "cpu" in caught.value.remedy


GONE = "CUDA error: no CUDA-capable device is detected"


class _Unplugged:
    """A callback on whose step the device's driver says that it is gone."""

    def __init__(self, step):
        self.last = step

    @luthier.event
    def step_ended(self, run, step):
        if step == self.last:
            raise torch.AcceleratorError(f"{GONE}\nCUDA kernel errors ...")


@pytest.mark.parametrize(("step", "has_checkpoint"), [(1, False), (3, True)])
def test_a_device_that_vanishes_is_told_with_the_newest_checkpoint(train, tmp_path, step, has_checkpoint):
    with pytest.raises(LuthierError) as caught:
        train(exact_callbacks=[_Unplugged(step)], save_steps=2, num_train_epochs=2)
    assert caught.value.code == "device-lost"
    assert caught.value.where == "cpu"
    assert f"step {step}:" in caught.value.problem and GONE in caught.value.problem
    assert ("step-00000002" in str(caught.value)) == has_checkpoint
    assert read_record(tmp_path / "run")["state"] == "failed"


def test_a_wrong_kernel_is_not_a_lost_device():
    assert not devices.is_gone(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    assert not devices.is_gone(ValueError("GPU is lost"))
