"""The C++ kernels: every instruction set, threads, forks, memory maps, strides."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from interpreter import run_python

from moso_fast import backends, last_layer_stats, moso_scores
from moso_fast.backends.cpu import SIMD_VARIABLE, CpuBackend
from moso_fast.core import memory
from moso_fast.core.reference import closed_form_stats
from moso_fast.util.native import load_native

CPU = sys.modules[CpuBackend.__module__]
MODULE = load_native("_cpu").module
pytestmark = pytest.mark.skipif(MODULE is None, reason="moso_fast._cpu is not built here")
VARIANTS = () if MODULE is None else MODULE.variants()
FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")


def problem(rows, classes, dim, heads=0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 7 * rows + 31 * classes + dim)
    shape = (heads, classes, dim) if heads else (classes, dim)
    features = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = torch.randn(shape, generator=generator) / dim**0.5
    bias = torch.randn(shape[:-1], generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[::5] = -100
    return features, weight, labels, bias


def assert_exact(stats, args, tolerance=1e-5, **options):
    expected = closed_form_stats(*args, **options)
    for name in FIELDS:
        value, exact = getattr(stats, name).double(), getattr(expected, name)
        exact = exact.reshape(value.shape)
        assert torch.equal(value.isnan(), exact.isnan()), name
        same = (value == exact) | exact.isnan()
        error = torch.where(same, 0.0, value - exact).norm()
        assert error <= tolerance * torch.where(exact.isfinite(), exact, 0.0).norm(), name


@pytest.fixture(params=["blocks", "slabs"])
def gradient(request, monkeypatch):
    """How many classes make the mean gradient of few rows: as they do, or as of many rows."""
    if request.param == "slabs":
        monkeypatch.setattr(CPU, "_SPLIT_GRAD_ROWS", 0)
    return request.param


# On both sides of the limit of the few-classes kernels, their groups, the panels, the column
# blocks (256), and the row tiles (48, 96, 252) of every instruction set.
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "classes", "dim"),
    [
        *[(97, 1, 5), (95, 2, 256), (193, 10, 257), (49, 13, 33), (253, 28, 64), (300, 29, 511)],
        *[(251, 32, 16), (505, 33, 17), (64, 100, 300), (40, 257, 770)],
    ],
)
def test_every_instruction_set(monkeypatch, variant, dtype, rows, classes, dim, gradient):
    monkeypatch.setenv(SIMD_VARIABLE, variant)
    args = problem(rows, classes, dim, dtype=dtype)
    stats = last_layer_stats(*args, backend="cpu", precision="highest")
    assert_exact(stats, args)
    again = last_layer_stats(*args, backend="cpu", precision="highest", chunk_size=61)
    assert_exact(again, args)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 8, 10])
def test_every_remainder_of_a_read(monkeypatch, variant, dtype, classes):
    """Reads of few classes give even and odd bfloat16; rows begin anywhere."""
    monkeypatch.setenv(SIMD_VARIABLE, variant)
    for dim in [*range(1, 34), 95, 127, 130]:
        features, *others = problem(50, classes, dim + 1, dtype=dtype)
        args = features[:, 1:], others[0][:, 1:], *others[1:]
        assert_exact(last_layer_stats(*args, backend="cpu", precision="highest"), args)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dim", [5, 256, 300])
@pytest.mark.parametrize("tail", range(1, 10))
def test_classes_past_the_last_full_panel(monkeypatch, variant, tail, dim):
    monkeypatch.setenv(SIMD_VARIABLE, variant)
    for args in (problem(95, 32 + tail, dim), problem(60, 32 + tail, dim, heads=2)):
        assert_exact(last_layer_stats(*args, backend="cpu", precision="highest"), args)


# Odd sums (pairs of columns and of rows), one and several heads, G in slabs and in blocks.
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "classes", "dim", "heads"),
    [(505, 33, 17, 0), (300, 29, 511, 0), (251, 40, 257, 3), (40, 257, 2050, 0), (95, 70, 1, 0)],
)
def test_medium_precision(monkeypatch, variant, dtype, rows, classes, dim, heads, gradient):
    monkeypatch.setenv(SIMD_VARIABLE, variant)
    rounds = MODULE.runs_bf16_products(variant)
    monkeypatch.setattr(CPU, "_may_round", lambda p: rounds and p.precision == "medium")
    args = problem(rows, classes, dim, heads, dtype=dtype)
    for chunk_size in (None, 61):
        stats = last_layer_stats(*args, backend="cpu", precision="medium", chunk_size=chunk_size)
        assert_exact(stats, args, 1e-2)
        # Rounded operands leave an error, float32 ones (checked above) none of this size.
        exact = closed_form_stats(*args).alignment.reshape(stats.alignment.shape)
        error = float((stats.alignment.double() - exact).nan_to_num().norm() / exact.nansum().abs())
        assert (error > 1e-6) == rounds


@pytest.mark.quick(1)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("classes", "dim"), [(1030, 300), (130, 2400)])
def test_large_heads_and_rows_that_are_left_out(monkeypatch, variant, dtype, kept, classes, dim):
    """Tiles of some columns at a time find a bad row when its first products are done."""
    monkeypatch.setenv(SIMD_VARIABLE, variant)
    if not kept:
        monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    features, weight, labels, bias = problem(300, classes, dim, dtype=dtype)
    features[7, dim - 1], features[101, 0], features[299, 256] = math.nan, math.inf, -math.inf
    args = (features, weight, labels, bias)
    options = {"backend": "cpu", "precision": "medium"}
    for chunk_size in (None, 70):
        stats = last_layer_stats(*args, nonfinite="exclude", chunk_size=chunk_size, **options)
        good = features.isfinite().all(1)
        assert torch.equal(stats.loss.isnan(), ~good | (labels < 0))
        clean = torch.where(good[:, None], features, 0), weight, labels.where(good, -100), bias
        assert_exact(stats, clean, 1e-2)
    with pytest.raises(ValueError, match="row 7 "):
        last_layer_stats(*args, **options)


@pytest.mark.skipif(
    MODULE is None or not MODULE.prefers_bf16_products(VARIANTS[0]),
    reason="needs fast bfloat16 products",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_leaves_a_rows_own_term_whole(monkeypatch, dtype):
    """With two rows a class the own term is nearly all of N a, and N a - q its difference."""
    generator = torch.Generator().manual_seed(3)
    classes, dim = 300, 64
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(2 * classes) % classes
    features = (centres[labels] + 0.5 * torch.randn(600, dim, generator=generator)).to(dtype)
    weight = 8 * centres / dim
    exact = closed_form_stats(features.double(), weight.double(), labels)
    n = exact.count
    scores = (n * exact.alignment[0] - exact.grad_sqnorm[0]) / (n - 1)

    def error():
        got = moso_scores(features, weight, labels, backend="cpu", precision="medium")
        return float((got.double() - scores).norm() / scores.norm())

    corrected = error()
    monkeypatch.setattr(CPU.CpuPasses, "whole", lambda *_, **__: None)
    pass_by_pass = error()
    monkeypatch.setattr(CPU.CpuPasses, "_self_term_scale", lambda *_: 0.0)
    assert max(corrected, pass_by_pass) < 5e-3 and error() > 1.2 * max(corrected, pass_by_pass)


_PEAK = """
import sys, torch
from moso_fast import last_layer_stats
rows, classes, dim, chunk = map(int, sys.argv[1:])
torch.set_num_threads(2)
features, weight = torch.randn(rows, dim), torch.randn(classes, dim)
labels = torch.randint(classes, (rows,))
def run(n):
    options = {"backend": "cpu", "chunk_size": chunk or None}
    return last_layer_stats(features[:n], weight, labels[:n], **options)
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
run(1000)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
results = run(rows)
print(status("VmHWM") - before)
"""


def peak_bytes(tmp_path, *sizes):
    """Peak of resident memory beyond the inputs, in a process of its own."""
    return int(run_python(_PEAK, tmp_path, *map(str, sizes)))


@pytest.mark.exhaustive
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_peak_memory(tmp_path):
    results = 6 * 4  # bytes a row that the caller keeps
    rows, classes = 150_000, 100
    kept = peak_bytes(tmp_path, rows, classes, 48, 0)
    assert kept < rows * (4 * classes + results) + 64 * 2**20
    assert kept > rows * 4 * classes  # the measure sees the residuals
    few, many = (peak_bytes(tmp_path, n, classes, 48, 4096) for n in (rows, 4 * rows))
    assert many < 64 * 2**20 + 4 * rows * 2 * results
    assert many - few < 3 * rows * 2 * results + 8 * 2**20


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("heads", "classes", "dim"), [(3, 4, 40), (12, 10, 64), (2, 70, 5000)])
def test_heads_share_a_sweep(monkeypatch, variant, heads, classes, dim, gradient):
    monkeypatch.setenv(SIMD_VARIABLE, variant)
    args = problem(130, classes, dim, heads)
    assert_exact(
        last_layer_stats(*args, backend="cpu", label_smoothing=0.1), args, 1e-5, label_smoothing=0.1
    )


@pytest.mark.parametrize("rows", [700, 5000])
def test_the_gradient_in_blocks_equals_the_gradient_in_slabs(monkeypatch, rows):
    args = problem(rows, 60, 300)
    monkeypatch.setattr(CPU, "_SPLIT_GRAD_ROWS", 0)
    whole = last_layer_stats(*args, backend="cpu")
    monkeypatch.setattr(CPU, "_SPLIT_GRAD_ROWS", rows)
    split = last_layer_stats(*args, backend="cpu")
    assert_exact(split, args)
    assert split.mean_grad_sqnorm == pytest.approx(whole.mean_grad_sqnorm, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "classes", "dim", "split"),
    [(9000, 10, 64, 0), (9000, 60, 64, 0), (9000, 60, 64, 9000), (300, 60, 700, 300)],
)
def test_bits_do_not_depend_on_threads(monkeypatch, rows, classes, dim, split, dtype):
    monkeypatch.setattr(CPU, "_SPLIT_GRAD_ROWS", split)
    monkeypatch.setattr(CPU, "_SINGLE_THREAD_WORK", 0)
    args = problem(rows, classes, dim, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 40):
            torch.set_num_threads(threads)
            results.append(last_layer_stats(*args, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name in FIELDS:
            assert getattr(other, name).equal(getattr(results[0], name)) or torch.equal(
                getattr(other, name).nan_to_num(7.0), getattr(results[0], name).nan_to_num(7.0)
            )
        assert other.mean_grad_sqnorm == results[0].mean_grad_sqnorm


def _score_in_child(queue, args):
    torch.set_num_threads(1)
    CPU._threads = lambda problem, rows: 2
    queue.put(moso_scores(*args, backend="cpu").nan_to_num(7.0).tolist())


def test_a_forked_child_can_score():
    """A pool of threads does not survive fork: the kernels must not wait for the parent's.

    PyTorch's own parallel operations do wait, for ever: a child wants torch.set_num_threads(1),
    which DataLoader sets in its workers.
    """
    args = problem(9000, 40, 64)
    expected = moso_scores(*args, backend="cpu").nan_to_num(7.0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_score_in_child, args=(queue, args))
    child.start()
    try:
        scores = queue.get(timeout=60)
    finally:
        child.join(10)
        child.kill()
    assert torch.equal(torch.tensor(scores), expected)


def test_several_python_threads_at_once():
    problems = [problem(5000, classes, 64, seed=classes) for classes in (3, 10, 40, 90)] * 3
    expected = [moso_scores(*args, backend="cpu").nan_to_num(7.0) for args in problems]
    with ThreadPoolExecutor(6) as pool:
        scores = list(pool.map(lambda args: moso_scores(*args, backend="cpu"), problems))
    for value, exact in zip(scores, expected, strict=True):
        assert torch.equal(value.nan_to_num(7.0), exact)


def test_features_in_a_read_only_memory_map(tmp_path):
    features, weight, labels, bias = problem(3000, 10, 64)
    path = tmp_path / "features.npy"
    np.save(path, features.numpy())
    mapped = np.load(path, mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable", once a process: scoring does not write
        view = torch.from_numpy(mapped)
    scores = moso_scores(view, weight, labels, bias, backend="cpu")
    exact = moso_scores(features, weight, labels, bias, backend="cpu")
    assert torch.equal(scores.nan_to_num(7.0), exact.nan_to_num(7.0))


@pytest.mark.parametrize("classes", [10, 60])
@pytest.mark.parametrize("layout", ["transposed", "every other column", "offset", "expanded"])
def test_strides(layout, classes):
    features, weight, labels, bias = problem(600, classes, 48)
    view = {
        "transposed": lambda: features.T.contiguous().T,
        "every other column": lambda: features.repeat_interleave(2, 1)[:, ::2],
        "offset": lambda: torch.cat([torch.zeros(1), features.flatten()])[1:].view(600, 48),
        "expanded": lambda: features[:1].expand(600, 48),
    }[layout]()
    args = (view, weight, labels, bias)
    assert_exact(last_layer_stats(*args, backend="cpu"), args)


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv(SIMD_VARIABLE, "neon2")
    availability = backends()["cpu"]
    assert not availability.available
    assert availability.reason == "MOSO_FAST_SIMD=neon2 is not among what this processor runs"
    with pytest.raises(ValueError, match=r"^backend='cpu' cannot run this problem: MOSO_FAST_SIMD"):
        moso_scores(*problem(10, 3, 4), backend="cpu")


def test_the_job_says_what_it_cannot_take():
    features, *rest = problem(10, 3, 4)
    with pytest.raises(ValueError, match="float64 features need float64 accumulators"):
        moso_scores(features.double(), *rest, backend="cpu")
    assert moso_scores(features.double(), *rest).dtype == torch.float64


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_over_very_many_classes_do_not_drift(monkeypatch, variant):
    """Equal terms that float32 rounds the same way 200,000 times: a plain sum is off by 7e-6."""
    monkeypatch.setenv(SIMD_VARIABLE, variant)
    classes = 200_000
    bias = torch.full((classes,), -0.1)
    bias[:3] = 0.3
    args = torch.ones(3, 2), torch.zeros(classes, 2), torch.arange(3), bias
    stats = last_layer_stats(*args, backend="cpu", label_smoothing=0.1)
    exact = closed_form_stats(*args, label_smoothing=0.1)
    for name in ("loss", "entropy"):
        expected = getattr(exact, name).flatten()
        assert (getattr(stats, name) / expected - 1).abs().max() < 2e-6, name


FORKED = """
import os, time
import torch
from moso_fast import moso_scores

generator = torch.Generator().manual_seed(0)
features = torch.randn(9000, 64, generator=generator)
weight = torch.randn(40, 64, generator=generator)
labels = torch.randint(40, (9000,), generator=generator)
torch.set_num_threads(2)
expected = moso_scores(features, weight, labels, backend="cpu")
child = os.fork()
if not child:
    torch.set_num_threads(1)  # PyTorch's own operations wait for threads that fork has not copied
    torch.get_num_threads = lambda: 2  # the kernels still ask for two
    scores = moso_scores(features, weight, labels, backend="cpu")
    os._exit(0 if torch.equal(scores, expected) else 3)
end = time.monotonic() + 60
while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
    time.sleep(0.05)
if status == (0, 0):
    os.kill(child, 9)
    os.waitpid(child, 0)
print("hangs" if status == (0, 0) else os.waitstatus_to_exitcode(status[1]))
"""


@pytest.mark.exhaustive
def test_a_child_of_plain_fork_can_score(tmp_path):
    """Nothing tells such a child that it is one, but for its process id."""
    assert run_python(FORKED, tmp_path) == "0\n"


@pytest.mark.parametrize("name", ["first_pass", "second_pass", "whole"])
def test_fields_of_a_job_are_all_there_and_known(name) -> None:
    run, job = getattr(MODULE, name), {"feature": 0}
    with pytest.raises(ValueError, match=r"^the job has a field 'feature' that no kernel takes$"):
        for _ in range(100):
            try:
                run(VARIANTS[0], job)
            except KeyError as error:
                lacking = re.fullmatch(r"the job lacks the field '(\w+)'", error.args[0])
                job[lacking[1]] = 0
    assert {"features", "weight", "counted", "few_classes"} < set(job)
    assert {"first_pass": "grad_sum", "second_pass": "residual", "whole": "score"}[name] in job
