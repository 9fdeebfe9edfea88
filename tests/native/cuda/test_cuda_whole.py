"""Jobs of one chunk, which the CUDA C++ kernels do in one go, beside the same pass by pass."""

from __future__ import annotations

import ctypes

import cuda_emulator
import pytest
import torch
from core_support import FIELDS, Case, random_case
from cuda_emulator import WHOLE, EmulatedCuda, in_place_of_a_gpu

from moso_fast import last_layer_stats, moso_scores
from moso_fast.backends.cuda.backend import CudaPasses
from moso_fast.core import formulas
from moso_fast.core.reference import closed_form_stats

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def gpu(emulator, monkeypatch):
    return in_place_of_a_gpu(emulator, monkeypatch)


def run(case: Case, **options):
    return last_layer_stats(*case.args, backend="cuda", **{**case.options, **options})


def pass_by_pass(gpu: EmulatedCuda, monkeypatch: pytest.MonkeyPatch, case: Case):
    with monkeypatch.context() as patch:
        patch.setattr(CudaPasses, "whole", lambda *given, **more: None)
        return run(case)


def some_ignored(case: Case, every: int) -> Case:
    labels = case.labels.clone()
    labels[::every] = -100
    return Case(case.features, case.weight, labels, case.bias, case.options)


@pytest.mark.parametrize("heads, bias", [(None, True), (None, False), (3, True)])
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("rows", [2, 63, 700])
def test_the_same_as_pass_by_pass(gpu, monkeypatch, heads, bias, every, rows) -> None:
    case = random_case("ids", n=rows, c=5, d=24, heads=heads, bias=bias)
    case = case.with_options(sample_weight=torch.rand(rows) + 0.5)
    if every is not None:
        case = some_ignored(case, every)
    found, expected = run(case), pass_by_pass(gpu, monkeypatch, case)
    assert [name for name, _ in gpu.launches[:5]] == [*WHOLE]
    assert not any(name.startswith("closing") for name, _ in gpu.launches[5:])
    for name in FIELDS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        # One root or product may round otherwise. The mean over all rows, put right at the end, is
        # rounded elsewhere than the one over those that count.
        rescaled = name == "alignment" and every is not None
        floor = 1e-6 * float(theirs[theirs.isfinite()].abs().max()) if rescaled else 0.0
        assert torch.allclose(ours, theirs, rtol=2e-7, atol=floor, equal_nan=True), name
    norms = [torch.as_tensor(s.mean_grad_sqnorm, dtype=torch.float64) for s in (found, expected)]
    assert torch.allclose(*norms, rtol=1e-12)
    assert found.count == expected.count


@pytest.mark.quick(3)
@pytest.mark.parametrize("formula", formulas.FORMULAS)
@pytest.mark.parametrize("heads", [None, 2])
def test_scores_are_those_of_the_formulas(gpu, formula, heads) -> None:
    case = some_ignored(random_case("ids", n=300, c=4, d=16, heads=heads), 7)
    stats = run(case)
    expected = formulas.score(
        formula, stats.alignment, stats.grad_sqnorm, stats._mean_grad_sqnorm, stats._count, 0.3
    )
    found = moso_scores(*case.args, formula=formula, scale=0.3, backend="cuda")
    assert gpu.launches[-1][0] == "closing_score"
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0.0, equal_nan=True)


def test_rows_are_counted_four_at_a_time(gpu, emulator) -> None:
    """Also where shares of the blocks that count end inside four, or are empty."""
    generator = torch.Generator().manual_seed(3)
    for rows in (1, 3, 4, 255, 256, 257, 1021, 9000):
        counted = torch.rand(rows, generator=generator) < 0.6
        counts = torch.zeros(emulator.closing_count_blocks, dtype=torch.int64)
        sums = [torch.zeros(64, dtype=torch.float64) for _ in range(4)]
        job = {
            **dict.fromkeys(("partial", "bias_partial", "slabs"), 0),
            **{"classes": 1, "dim": 1, "rows": rows},
            **{"grad_sum": sums[0].data_ptr(), "bias_grad_sum": sums[1].data_ptr()},
            **{"mean": sums[2].data_ptr(), "bias_mean": sums[3].data_ptr()},
            **{"counted": counted.data_ptr(), "counts": counts.data_ptr()},
        }
        gpu._launch(torch.device("cpu"), emulator.few_classes_reduce, job)
        assert int(counts.sum()) == int(counted.sum()), rows


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda case: case.weight.__setitem__((1, 3), float("nan")), r"^weight\[1, 3\] is nan"),
        (lambda case: case.bias.__setitem__(2, float("inf")), r"^bias\[2\] is inf"),
        (
            lambda case: case.options["sample_weight"].__setitem__(4, float("nan")),
            r"^sample_weight\[4\] is nan",
        ),
        (lambda case: case.labels.__setitem__(5, 11), r"^labels\[5\] is 11, outside \[0, 4\)"),
        (lambda case: case.features.__setitem__((6, 2), float("nan")), r"^features\[6, 2\] is nan"),
        (lambda case: case.labels[1:].fill_(-100), "only 1 sample counts"),
    ],
)
def test_bad_data_is_refused_in_the_same_words(gpu, spoil, message) -> None:
    case = random_case("ids", n=40, c=4, d=16).with_options(sample_weight=torch.ones(40))
    spoil(case)
    with pytest.raises(ValueError, match=message):
        moso_scores(*case.args, backend="cuda", **case.options)


def test_wrong_alignments_are_found(gpu, monkeypatch) -> None:
    launch = gpu._launch

    def spoilt(device, function, job, *parts):
        if function.__name__ == "closing_finish":
            memory = (ctypes.c_float * job["rows"]).from_address(job["alignment"])
            torch.frombuffer(memory, dtype=torch.float32).mul_(1.01)
        launch(device, function, job, *parts)

    monkeypatch.setattr(cuda_emulator.cuda_device, "launch", spoilt)
    monkeypatch.setattr(gpu, "_launch", spoilt)
    with pytest.raises(RuntimeError, match=r"^self-check failed for head 0"):
        run(random_case("ids", n=60, c=4, d=16))


def test_against_float64(gpu) -> None:
    case = some_ignored(random_case("ids", n=1500, c=10, d=32), 4)
    exact = closed_form_stats(*case.args)
    found = run(case)
    assert found.mean_grad_sqnorm == pytest.approx(exact.mean_grad_sqnorm, rel=1e-5)
    scale = exact.alignment[exact.alignment.isfinite()].abs().max()
    error = (found.alignment.double() - exact.alignment).nan_to_num(0.0).abs().max() / scale
    assert error < 1e-5
