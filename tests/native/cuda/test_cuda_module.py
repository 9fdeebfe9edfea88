"""The CUDA module's device query, on machines with and without a device."""

from __future__ import annotations

import pytest
import torch

from moso_fast.util.native import build_info, load_native


@pytest.fixture(scope="module")
def cuda():
    """Return moso_fast._cuda, or skip where it was not built; never where it was and is broken."""
    found = load_native("_cuda")
    if found.module is None and "_cuda" not in build_info().get("built", []):
        pytest.skip(found.reason)
    assert found.module is not None, found.reason
    return found.module


def test_load_native_refuses_other_names() -> None:
    with pytest.raises(ValueError, match="name must be one of _cpu, _cuda; got 'torch'"):
        load_native("torch")


def test_query_agrees_with_torch(cuda) -> None:
    report = cuda.device_query()
    assert report["count"] == len(report["devices"]) == torch.cuda.device_count()
    assert report["runtime_version"] >= 11000
    for index, device in enumerate(report["devices"]):
        properties = torch.cuda.get_device_properties(index)
        assert device["index"] == index
        assert device["name"] == properties.name
        assert device["capability"] == torch.cuda.get_device_capability(index)
        assert device["total_memory"] == properties.total_memory
        assert device["multiprocessors"] == properties.multi_processor_count
    assert (report["error"] == "") == (report["count"] > 0)


def test_without_a_device_the_error_says_why(cuda) -> None:
    report = cuda.device_query()
    if report["count"]:
        pytest.skip("this machine has a device")
    assert report["error"].startswith("cudaGetDeviceCount: ")
    assert cuda.check_launch(0) != ""
    assert cuda.device_query() == report  # a failed call leaves nothing behind


def test_architectures_hold_binary_code_and_ptx(cuda) -> None:
    names = cuda.architectures.split()
    assert names[-1].startswith("compute_")
    assert names[:-1] == [f"sm_{arch}" for arch in build_info()["cuda_architectures"]]


@pytest.mark.gpu
def test_probe_kernel_runs_on_every_device(cuda) -> None:
    current = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        assert cuda.check_launch(index) == ""
    assert torch.cuda.current_device() == current
    assert "invalid device ordinal" in cuda.check_launch(torch.cuda.device_count())
