"""The CPU path against the best plain PyTorch, whole job: loss, alignment, self norm.

    pytest benches/suites/bench_cpu.py --benchmark-enable --save-results benches/results/cpu.json

Ratios are medians of interleaved runs in one process, float32 against float32 with the checks of
labels and features on. ``floor_ms`` is the larger of 6 N C D FLOPs over the rate of ``torch.mm``
and two reads of the features over the read bandwidth, both measured in this run. Results are
compared with float64 first: a wrong one fails and gets no number. With --benchmark-disable only
that comparison runs, on fewer rows.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import Tensor

from moso_fast import backends, last_layer_stats
from moso_fast.bench import measure
from moso_fast.bench.measure import interleaved, medians
from moso_fast.bench.providers.plain import CHUNK_ROWS, chunked, compiled, jvp, naive
from moso_fast.core.reference import closed_form_stats

# C, D, N, the least ratio to the best plain PyTorch that the project asks for.
CASES = [
    (10, 512, 65536, 3.0),
    (2, 768, 65536, 2.0),
    (10, 2048, 16384, 2.5),
    (32, 1024, 32768, 1.5),
    (100, 512, 32768, 1.25),
    (100, 2048, 16384, 1.15),
    (1000, 512, 8192, 1.0),
    (1000, 2048, 4096, 1.0),
]
ROUNDS = 9
CHECK_ROWS = 1024
COMPILED_ROWS = 2048

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].available, reason="the C++ backend is not built: moso-fast doctor"
)


@cache
def ceilings() -> tuple[float, float]:
    """FLOP/s of torch.mm and bytes/s of reading memory, once a run."""
    roof = measure.ceilings()
    return roof["mm_flops"], roof["read_bytes"]


def make(classes: int, dim: int, rows: int, heads: int = 0) -> tuple[Tensor, ...]:
    """Random features, weight, labels and bias of a head that has learnt something."""
    generator = torch.Generator().manual_seed(classes * dim)
    shape = (heads, classes, dim) if heads else (classes, dim)
    weight = torch.randn(shape, generator=generator) / dim**0.5
    bias = torch.randn(shape[:-1], generator=generator)
    features = torch.randn(rows, dim, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    first = weight[0] if heads else weight
    features += 4.0 * first[labels] / first.norm(dim=1).mean()
    return features, weight, labels, bias


def check(args: tuple[Tensor, ...], tolerance: float) -> float:
    """Return the largest relative error of our three results; fail above ``tolerance``."""
    features, weight, labels, bias = args
    part = (features[:CHECK_ROWS], weight, labels[:CHECK_ROWS], bias)
    ours, exact = last_layer_stats(*part, backend="cpu"), closed_form_stats(*part)
    worst = 0.0
    for name in ("loss", "alignment", "grad_sqnorm"):
        expected = getattr(exact, name).reshape(-1)
        error = getattr(ours, name).double().reshape(-1) - expected
        worst = max(worst, float(error.norm() / expected.norm()))
    assert worst <= tolerance
    return worst


def floor_seconds(args: tuple[Tensor, ...]) -> float:
    """Time that torch.mm's FLOP rate and the read bandwidth allow at best."""
    flops, bandwidth = ceilings()
    features, weight = args[0], args[1]
    work = 6 * features.shape[0] * weight.numel() / flops
    return max(work, 2 * features.numel() * features.element_size() / bandwidth)


@pytest.mark.parametrize(("classes", "dim", "rows", "least"), CASES)
def test_against_plain_pytorch(benchmark, report, classes, dim, rows, least):
    args = make(classes, dim, rows if benchmark.enabled else CHECK_ROWS)
    error = check(args, 1e-5)
    if not benchmark.enabled:
        return
    ours = "moso_fast"
    functions = {
        ours: lambda: last_layer_stats(*args, backend="cpu"),
        "naive": lambda: naive(*args),
        "jvp": lambda: jvp(*args),
        "torch backend": lambda: last_layer_stats(*args, backend="torch"),
    }
    for name, opponent in {
        **{f"chunks of {n}": chunked(n) for n in CHUNK_ROWS if n <= rows},
        f"compiled, {COMPILED_ROWS}": compiled(COMPILED_ROWS),
    }.items():
        functions[name] = partial(opponent, *args)
    times = medians(interleaved(functions, ROUNDS, warm_up=True))
    plain = {k: v for k, v in times.items() if k not in (ours, "torch backend")}
    best = min(plain, key=plain.__getitem__)
    floor = floor_seconds(args)
    flops, _ = ceilings()
    report(
        {
            "C": classes,
            "D": dim,
            "N": rows,
            "ours_ms": times[ours] * 1e3,
            "ratio": plain[best] / times[ours],
            "asked": least,
            "best_plain": best,
            "naive_x": times["naive"] / times[ours],
            "jvp_x": times["jvp"] / times[ours],
            "torch_backend_x": times["torch backend"] / times[ours],
            "floor_ms": floor * 1e3,
            "x_floor": times[ours] / floor,
            "mm_rate_share": 6 * rows * classes * dim / times[ours] / flops,
            "error": error,
        }
    )
    benchmark.extra_info.update(best_plain=best, ratio=plain[best] / times[ours])
    benchmark.pedantic(functions[ours], rounds=3)


@pytest.mark.parametrize(("classes", "dim", "rows"), [(10, 512, 65536), (100, 512, 32768)])
def test_sixteen_bit_features(benchmark, report, classes, dim, rows):
    """bfloat16 features against our own float32."""
    args = make(classes, dim, rows if benchmark.enabled else CHECK_ROWS)
    narrow = (args[0].bfloat16(), *args[1:])
    error = check(narrow, 1e-2)
    if not benchmark.enabled:
        return
    functions = {
        "float32": lambda: last_layer_stats(*args, backend="cpu"),
        "bfloat16": lambda: last_layer_stats(*narrow, backend="cpu"),
    }
    times = medians(interleaved(functions, ROUNDS, warm_up=True))
    report(
        {
            "C": classes,
            "D": dim,
            "N": rows,
            "ours_ms": times["bfloat16"] * 1e3,
            "ratio": times["float32"] / times["bfloat16"],
            "asked": 1.2 if classes == 10 else 1.5,
            "best_plain": "ours, float32",
            "error": error,
        }
    )
    benchmark.pedantic(functions["bfloat16"], rounds=3)


@pytest.mark.parametrize("heads", [12])
def test_heads_over_the_same_features(benchmark, report, heads):
    """Several heads in one call against one head."""
    rows = 65536 if benchmark.enabled else CHECK_ROWS
    args = make(10, 512, rows, heads)
    error = check(args, 1e-5)
    if not benchmark.enabled:
        return
    one = (args[0], args[1][0].contiguous(), args[2], args[3][0].contiguous())
    functions = {
        "one": lambda: last_layer_stats(*one, backend="cpu"),
        "all": lambda: last_layer_stats(*args, backend="cpu"),
    }
    times = medians(interleaved(functions, ROUNDS, warm_up=True))
    floor = floor_seconds(args)
    report(
        {
            "C": f"{heads}x10",
            "D": 512,
            "N": rows,
            "ours_ms": times["all"] * 1e3,
            "ratio": times["all"] / times["one"],
            "best_plain": "time over one head",
            "floor_ms": floor * 1e3,
            "x_floor": times["all"] / floor,
            "error": error,
        }
    )
    benchmark.pedantic(functions["all"], rounds=3)
