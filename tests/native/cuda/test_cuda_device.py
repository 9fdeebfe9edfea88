"""The GPU that the CUDA kernels run on, as the host asks for it: torch.cuda writes down how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moso_fast.backends.cuda import device as gpu
from moso_fast.util.native import NativeModule

CPU = torch.device("cpu")


class Cuda:
    """Two GPUs, of which number 1 is the current one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.entered = 1, 0
        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "device", self._device)
        streams, capabilities, limits = (
            {0: 70, 1: 71},
            {0: (8, 6), 1: (9, 0)},
            [(99, 46), (227, 132)],
        )
        raw = "_cuda_getCurrentRawStream"
        patch.setattr(torch._C, raw, streams.__getitem__, raising=False)
        patch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        self.module = SimpleNamespace(device_limits=limits.__getitem__)
        native = NativeModule(self.module, "", "")  # type: ignore[arg-type]
        patch.setattr(gpu, "load_native", lambda name: {"_cuda": native}[name])
        for cached in (gpu.capability, gpu.limits):
            cached.cache_clear()

    @contextmanager
    def _device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        self.entered += 1
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    yield Cuda(monkeypatch)
    for cached in (gpu.capability, gpu.limits):
        cached.cache_clear()


def test_a_device_without_a_number_is_the_current_one(cuda) -> None:
    assert [gpu.index(torch.device(name)) for name in ("cuda", "cuda:0", "cuda:1")] == [1, 0, 1]
    assert gpu.module() is cuda.module


def test_limits_are_those_of_the_device(cuda) -> None:
    for name, shared, processors, bulk in (
        ("cuda:0", 99, 46, False),
        ("cuda:1", 227, 132, True),
        ("cuda", 227, 132, True),
    ):
        device = torch.device(name)
        assert gpu.shared_limit(device) == shared
        assert gpu.multiprocessors(device) == processors
        assert gpu.bulk_copies(device) == bulk
    assert gpu.limits(0) == (99, 46) and gpu.capability(0) == (8, 6)


def test_a_launch_goes_to_the_stream_of_the_device(cuda) -> None:
    """Which is the current one meanwhile; parts of a job are told too."""
    for name, number, stream, entered in (
        ("cuda:1", 1, 71, 0),
        ("cuda", 1, 71, 0),
        ("cuda:0", 0, 70, 1),
    ):
        cuda.entered = 0
        seen: list[Any] = []
        job, parts = {"rows": 5}, ({"part": 1}, {"part": 2})
        gpu.launch(
            torch.device(name), lambda job, s=seen: s.append((job, cuda.current)), job, *parts
        )
        assert seen == [(job, number)] and seen[0][0] is job
        assert job == {"rows": 5, "device": number, "stream": stream}
        assert [part["part"] for part in parts] == [1, 2]
        for part in parts:
            assert (part["device"], part["stream"]) == (number, stream)
        assert (cuda.entered, cuda.current) == (entered, 1)


@pytest.mark.parametrize(
    "architectures, runs",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)]),
        ("sm_86", [(8, 6), (8, 9)]),
        ("sm_90a", [(9, 0)]),
        ("sm_80 sm_90a", [(8, 0), (8, 6), (8, 9), (9, 0)]),
        ("sm_100 compute_100", [(10, 0), (10, 3)]),
        ("sm_120", [(12, 0)]),
        ("compute_80", []),
        ("", []),
    ],
)
def test_which_gpus_binary_code_runs_on(architectures, runs) -> None:
    every = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert [of for of in every if gpu.compiled_for(of, architectures)] == runs


def job_on(device: torch.device) -> Any:
    return SimpleNamespace(device=device)


def test_memory_for_kernels(monkeypatch) -> None:
    found = gpu.empty(job_on(CPU), 3, 4)
    assert (found.shape, found.dtype) == ((3, 4), torch.float32)
    assert gpu.empty(job_on(torch.device("meta")), 2, dtype=torch.float64).device.type == "meta"
    asked: list[Any] = []
    monkeypatch.setattr(torch, "empty", lambda *given, **more: asked.append((given, more)))
    gpu.facts(job_on(CPU), 17, True)
    gpu.facts(job_on(CPU), 17, False)
    assert asked == [
        ((17,), {"dtype": torch.float64, "pin_memory": True, "device": "cpu"}),
        (((17,),), {"dtype": torch.float64, "device": CPU}),
    ]


def test_one_piece_of_memory_is_cut_at_multiples() -> None:
    memory, at = gpu.carve(job_on(CPU), 128, a=1, b=128, c=129, d=0, e=8)
    start = memory.data_ptr()
    assert {name: address - start for name, address in at.items()} == {
        "a": 0, "b": 128, "c": 256, "d": 512, "e": 512,
    }  # fmt: skip
    assert memory.dtype == torch.float64 and memory.numel() * 8 == 640
