"""What the host waits for in a call on a GPU, shown on a CPU whose reads are counted.

On a CPU every read is free and nobody waits. These tests have the engine believe that work is only
queued, as on a GPU, and count all that would stop the host until the queue is empty.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_support import CPU_BACKENDS, FIELDS, Case, random_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moso_fast.backends.triton.choice import REGIME_VARIABLE, REGIMES
from moso_fast.backends.triton.regime import interpreted
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.core import engine
from moso_fast.core.problem import Problem
from moso_fast.functional import LastLayerStats, last_layer_stats, moso_scores

# The kernels for CPUs never run on anything that works behind the host's back.
BACKENDS = tuple(name for name in CPU_BACKENDS if name != "cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)

# Operators whose result, or its shape, the host must know.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")


class HostTensor(Tensor):
    """In main memory, with all that is made of such tensors alone, until it is sent away."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kind = cls if all(isinstance(tensor, cls) for tensor in given) else Tensor
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return tree_map_only(Tensor, lambda tensor: tensor.as_subclass(kind), result)


class Reads(TorchDispatchMode):
    """Every time the host learns a number of a tensor that is not its own: who, in whose code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators: list[str] = []
        self.paused = False

    def note(self, what: str, tensor: Any) -> None:
        if not self.paused and not isinstance(tensor, HostTensor):
            frame = sys._getframe(2)
            while frame.f_back is not None and "moso_fast" not in frame.f_code.co_filename:
                frame = frame.f_back
            self.found.append(f"{what} in {frame.f_code.co_name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operators.append(name)
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in _WAITING or masks:
            self.note(name, args[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Count what is read within ``engine.run``, where the operator hides it from other modes."""
    counter = Reads()
    run = engine.run

    def counted_run(*args: Any, **kwargs: Any) -> Any:
        with counter:
            return run(*args, **kwargs)

    monkeypatch.setattr(engine, "run", counted_run)
    for name in ("tolist", "cpu", "numpy"):  # of no concern to a dispatcher on a CPU
        monkeypatch.setattr(Tensor, name, _reading(counter, name))
    monkeypatch.setattr(Tensor, "to", _sending(counter))
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *given, **options: _made(arange, given, options))
    if interpreted():
        _leave_out_interpreter(counter, monkeypatch)
    return counter


def _reading(counter: Reads, name: str) -> Callable[..., Any]:
    original = getattr(Tensor, name)

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        counter.note(name, self)
        result = original(self, *args, **kwargs)
        return result.as_subclass(HostTensor) if name == "cpu" else result

    return method


def _sending(counter: Reads) -> Callable[..., Tensor]:
    """To send is to wait, too: the host's memory must stay as it is until all has arrived."""
    original = Tensor.to

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, HostTensor) or isinstance(args[0], torch.dtype):
            return original(self, *args, **kwargs)
        counter.note("upload", None)
        with torch._C.DisableTorchFunctionSubclass():
            return original(self, *args, **kwargs).as_subclass(Tensor)

    return method


def _made(factory: Callable[..., Tensor], given: Any, options: dict[str, Any]) -> Tensor:
    """Make a tensor, in main memory where nothing names a device."""
    result = factory(*given, **options)
    return result if "device" in options else result.as_subclass(HostTensor)


def _leave_out_interpreter(counter: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def paused(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.paused = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            counter.paused = False

    monkeypatch.setattr(GridExecutor, "__call__", paused)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine believe that operations return before their results are there."""
    monkeypatch.setattr(Problem, "asynchronous", True)


def _ignoring(case: Case) -> Case:
    case.labels[[2, 9]] = -100
    return case


def _with_bad_rows(case: Case) -> Case:
    case.features[4, 1] = float("nan")
    case.features[11, 0] = float("-inf")
    return case


def _weights() -> Tensor:
    return torch.linspace(-1.0, 2.0, 17)


OFFSETS = torch.tensor([0, 4, 4, 5, 17])

# Calls with nothing wrong: name -> (case, options of the call).
GOOD: dict[str, Callable[[], tuple[Case, dict[str, Any]]]] = {
    "ids": lambda: (random_case("ids"), {}),
    "no bias": lambda: (random_case("ids", bias=False), {}),
    "smoothed": lambda: (random_case("ids_smoothed"), {}),
    "soft": lambda: (random_case("soft"), {}),
    "binary": lambda: (random_case("binary"), {}),
    "mse": lambda: (random_case("mse"), {}),
    "bfloat16": lambda: (random_case("ids", dtype=torch.bfloat16), {}),
    "sample weights": lambda: (random_case("ids", sample_weight=_weights()), {}),
    "ignored rows": lambda: (_ignoring(random_case("ids")), {}),
    "excluded rows": lambda: (_with_bad_rows(random_case("ids")), {"nonfinite": "exclude"}),
    "ignored and excluded": lambda: (
        _ignoring(_with_bad_rows(random_case("ids", heads=2))),
        {"nonfinite": "exclude", "chunk_size": 5},
    ),
    "heads": lambda: (random_case("ids", heads=3), {}),
    "chunks": lambda: (random_case("ids"), {"chunk_size": 5}),
    "no rows": lambda: (random_case("ids", n=0, sample_weight=torch.zeros(0)), {}),
    "sequences": lambda: (_ignoring(random_case("ids")), {"cu_seqlens": OFFSETS}),
    "sequences in chunks": lambda: (
        random_case("soft", heads=2),
        {"cu_seqlens": OFFSETS, "chunk_size": 5},
    ),
}


def stats_of(name: str, backend: str) -> LastLayerStats:
    case, options = GOOD[name]()
    return last_layer_stats(*case.args, backend=backend, **case.options, **options)


@pytest.mark.parametrize("name", GOOD)
@each_backend
def test_a_good_call_reads_once(name, backend, reads, queued) -> None:
    stats_of(name, backend)
    # The host cuts rows by offsets: it must have them before it can launch anything. Which rows
    # make up sequences of one length it then sends, for each batch of them.
    offsets = ["cpu in sequence_offsets"] if name.startswith("sequences") else []
    found = [entry for entry in reads.found if entry != "upload in _pairwise"]
    if backend == "triton":  # by cuBLAS, of float32 numbers: a look at the norms of each chunk
        look = "_local_scalar_dense in safe_features"
        assert found.count(look) in (0, 2 if name == "sequences in chunks" else 1)
        found = [entry for entry in found if entry != look]
    assert found == [*offsets, "tolist in _read"]
    assert "upload in _pairwise" not in reads.found or offsets


@pytest.mark.parametrize("name", ["ids", "bfloat16", "excluded rows"])
@pytest.mark.parametrize("regime", [name for name in REGIMES if "triton" in BACKENDS])
def test_regimes_of_triton_read_once(regime, name, reads, queued, monkeypatch) -> None:
    monkeypatch.setenv(REGIME_VARIABLE, regime)
    stats_of(name, "triton")
    # Products by cuBLAS know no mask. Ahead of them bad rows must be cleared: a look at a chunk's
    # norms saves a copy of it. Where residuals are rounded a flag says whether a kernel that
    # leaves bad rows out must make the gradient sum instead.
    where = "_narrow_first" if name == "bfloat16" else "safe_features"
    looks = [f"_local_scalar_dense in {where}"] if regime == "blas" else []
    assert reads.found == [*looks, "tolist in _read"]


@pytest.mark.skipif("triton" not in BACKENDS, reason="the Triton backend does not run here")
@pytest.mark.parametrize("case", [dict(c=5, d=7), dict(c=9, d=4)], ids=["H G^T", "R G"])
def test_triton_asks_for_bad_rows_once_a_chunk_and_never_under_capture(
    case, reads, queued, monkeypatch
) -> None:
    monkeypatch.setenv(REGIME_VARIABLE, "blas")
    given = random_case("ids", dtype=torch.bfloat16, **case)
    last_layer_stats(*given.args, backend="triton", chunk_size=6)
    flag = "_local_scalar_dense in _narrow_first"
    assert reads.found == [flag, flag, flag, "tolist in _read"]
    reads.found.clear()
    monkeypatch.setattr(engine, "_capturing", lambda problem: True)
    monkeypatch.setattr(triton_blas, "capturing", lambda problem: True)
    last_layer_stats(*given.args, backend="triton", chunk_size=6)
    assert reads.found == []


@pytest.mark.parametrize("name", ["ids", "sequences"])
def test_scores_and_their_formula_read_no_more(name, reads, queued) -> None:
    case, options = GOOD[name]()
    with reads:
        moso_scores(*case.args, backend="torch", **options)
    assert reads.found[-1] == "tolist in _read" and reads.found.count("tolist in _read") == 1
    assert set(reads.found[:-1]) <= {"cpu in sequence_offsets", "upload in _pairwise"}


def test_the_counter_sees_every_way_to_read(reads) -> None:
    """On a CPU the engine reads as it goes along, and everything that it reads is seen."""
    stats_of("ids", "torch")
    where = {entry.split(" in ")[1] for entry in reads.found}
    assert len(reads.found) >= 5 and where == {"_read", "safe_features"}
    values = torch.ones(3)
    ways: tuple[Callable[[], object], ...] = (
        *(values.tolist, values.cpu, values.numpy, values.nonzero, values.unique),
        *(values[0].item, values[0].tolist, lambda: int(values[0]), lambda: float(values[0])),
        *(lambda: bool(values[0]), lambda: values[values > 0], lambda: torch.equal(values, values)),
        *(lambda: f"{values[0]:.3f}", lambda: values.masked_select(values > 0)),
    )
    for number, way in enumerate(ways):
        reads.found.clear()
        with reads:
            way()
        assert len(reads.found) == 1, number
    reads.found.clear()
    host = values.cpu()
    with reads:
        assert (int(host[1]), host.diff().tolist()) == (1, [0.0, 0.0])
        assert host.to(values.device).tolist() == [1.0, 1.0, 1.0]
    assert [entry.split()[0] for entry in reads.found] == ["cpu", "upload", "tolist"]


@pytest.mark.raw_memory
@pytest.mark.parametrize("name", GOOD)
@each_backend
def test_results_are_the_same_bits_whenever_they_are_judged(name, backend, monkeypatch) -> None:
    found = []
    for late in (False, True):
        monkeypatch.setattr(Problem, "asynchronous", late)
        found.append(stats_of(name, backend))
    for field in FIELDS:
        pair = [getattr(stats, field) for stats in found]
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)
    assert found[0].count == found[1].count
    assert torch.equal(found[0]._mean_grad_sqnorm, found[1]._mean_grad_sqnorm)


@pytest.mark.parametrize("name, masked", [("ids", 0), ("ignored rows", 6)])
def test_results_are_only_masked_where_something_is_left_out(name, masked, reads, queued) -> None:
    """The host knows from the one read whether it must launch that."""
    stats_of(name, "torch")
    nan_for_the_ignored = reads.operators[-masked:].count("masked_fill_") if masked else 0
    assert nan_for_the_ignored == masked
    # Beside them the residuals of one chunk, and what the self-check sums.
    assert reads.operators.count("masked_fill_") == masked + 2


def test_under_capture_nothing_is_read_and_everything_masked(reads, queued, monkeypatch) -> None:
    expected = stats_of("ignored rows", "torch")
    monkeypatch.setattr(engine, "_capturing", lambda problem: True)
    reads.found.clear()
    got = stats_of("ignored rows", "torch")
    spoiled = _with_bad_rows(random_case("ids"))
    spoiled.labels[0] = 77
    last_layer_stats(*spoiled.args, backend="torch")
    assert reads.found == []
    for field in FIELDS:
        pair = getattr(got, field), getattr(expected, field)
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


def test_bad_offsets_are_refused_before_anything_is_launched(reads, queued) -> None:
    case = random_case("ids")
    case.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^cu_seqlens must end at the number of rows, 17; got 16"):
        last_layer_stats(*case.args, backend="torch", cu_seqlens=torch.tensor([0, 16]))
    assert reads.found == ["cpu in sequence_offsets"]
