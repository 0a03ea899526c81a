import subprocess
import sys

import pytest
import torch

from megatron import accelerators
from megatron.accelerators import UnavailableDeviceError
from megatron.accelerators.base import host_threads, usable_cores


def test_cpu_is_always_there():
    cpu = accelerators.select("cpu")
    assert cpu.is_available()
    assert cpu.unavailable_reason() == ""
    assert cpu.set_device(0) == cpu.set_device(7) == torch.device("cpu")


def test_auto_takes_the_first_available_in_the_declared_order():
    expected = next(name for name in accelerators.DEVICES if accelerators.load(name).is_available())
    assert accelerators.select("auto").name == expected


def test_cpu_is_probed_last():
    assert accelerators.DEVICES[-1] == "cpu"


@pytest.mark.parametrize("name", accelerators.DEVICES)
def test_every_device_satisfies_the_protocol(name: str):
    device = accelerators.load(name)
    assert device.name == name
    members = [member for member in dir(accelerators.Accelerator) if not member.startswith("_")]
    assert "peak_flops" in members
    for member in members:
        assert hasattr(device, member), member
    assert torch.float32 in device.capabilities.dtypes
    assert all(variable.name and variable.why for variable in device.environment)
    assert device.is_available() == (not device.unavailable_reason())


def test_unknown_device_is_refused_with_what_is_here():
    with pytest.raises(UnavailableDeviceError) as refusal:
        accelerators.select("tpu")
    message = str(refusal.value)
    assert "--device tpu" in message
    for name in accelerators.DEVICES:
        assert name in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_unavailable_device_is_refused_with_the_reason():
    with pytest.raises(UnavailableDeviceError, match=r"--device cuda: torch .*; cpu: available"):
        accelerators.select("cuda")


def test_deepspeed_is_told_the_same_device():
    cpu = accelerators.select("cpu")
    assert accelerators.deepspeed_environment(cpu, {}) == {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    environment = accelerators.deepspeed_environment(cpu, {"LOCAL_WORLD_SIZE": "4", "DS_ACCELERATOR": "cpu"})
    assert environment["LOCAL_SIZE"] == "4"
    environment = accelerators.deepspeed_environment(cpu, {"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "2"})
    assert environment["LOCAL_SIZE"] == "2"


def test_contradicting_deepspeed_device_is_refused():
    with pytest.raises(UnavailableDeviceError, match="DS_ACCELERATOR=hpu contradicts the device cpu"):
        accelerators.deepspeed_environment(accelerators.select("cpu"), {"DS_ACCELERATOR": "hpu"})


def test_host_threads_share_the_cores():
    assert host_threads(1).value == str(usable_cores())
    assert host_threads(10_000).value == "1"
    with pytest.raises(ValueError, match="at least 1"):
        host_threads(0)


def test_importing_loads_no_vendor_package():
    vendors = ["flash_attn", "apex", "liger_kernel", "transformer_engine", "deepspeed", "transformers", "triton"]
    code = (
        "import sys, importlib, megatron.accelerators as a, megatron.ops\n"
        "[importlib.import_module(a.load(name).ops_module) for name in a.DEVICES]\n"
        f"print([name for name in {vendors} if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
