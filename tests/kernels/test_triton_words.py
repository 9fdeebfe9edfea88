"""What the Triton backend says, in whole sentences: of itself, of a problem, of its cache."""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import random_case
from triton_cases import needs_triton, problem_of, shape

from moso_fast.backends.triton import autotune
from moso_fast.backends.triton import backend as triton_backend
from moso_fast.backends.triton import choice as triton_choice
from moso_fast.backends.triton import regime as triton_regime
from moso_fast.backends.triton.autotune import TileCache
from moso_fast.backends.triton.backend import TritonBackend
from moso_fast.backends.triton.choice import REGIMES, Rule, choose_regime
from moso_fast.backends.triton.regimes import few_classes
from moso_fast.core.passes import Plan

ON_A_GPU = "run on a machine with an NVIDIA GPU and a PyTorch built for CUDA"


@pytest.mark.parametrize(
    "setting, reason, how",
    [
        ({"version": None}, "Triton is not installed", 'pip install "triton>=3.6"'),
        ({"version": "3.5.9"}, "Triton 3.5.9 is older than 3.6", 'pip install "triton>=3.6"'),
        ({"hip": "6.4"}, "the kernels are tested for NVIDIA GPUs only and this PyTorch is for ROCm",
         "use backend='torch', which runs on ROCm"),
        ({"cuda": False}, "Triton 3.9.0 is installed but PyTorch {torch} finds no CUDA device",
         ON_A_GPU),
        ({}, "Triton 3.9.0, kernels tested by interpreter and compiler, some timed on an H200", ""),
        ({"version": "4.0"},
         "Triton 4.0, kernels tested by interpreter and compiler, some timed on an H200", ""),
        ({"interpret": True, "cuda": False},
         "Triton 3.9.0 in its interpreter, for tests: slow", ""),
    ],
)  # fmt: skip
def test_whether_it_can_run(machine, setting, reason, how) -> None:
    machine(**setting)
    found = TritonBackend().availability()
    assert (found.available, found.reason) == (not how, reason.format(torch=torch.__version__))
    assert found.how == how


def test_a_triton_that_has_no_record(machine, monkeypatch) -> None:
    machine()
    monkeypatch.setattr(triton_backend, "_version", lambda: None)
    assert TritonBackend().availability().reason.startswith("Triton of unknown version, kernels")
    monkeypatch.undo()
    packages = {"triton": ["pytorch-triton", "other"], "torch": ["torch"]}
    monkeypatch.setattr(triton_backend.metadata, "packages_distributions", lambda: packages)
    monkeypatch.setattr(triton_backend.metadata, "version", {"pytorch-triton": "3.7.1"}.__getitem__)
    assert triton_backend._version.__wrapped__() == "3.7.1"
    del packages["triton"]
    assert triton_backend._version.__wrapped__() is None
    for name, found in (("triton", True), ("other", False)):
        specs = {name: object()}
        monkeypatch.setattr(triton_backend.importlib.util, "find_spec", specs.get)
        assert triton_backend._installed.__wrapped__() == found
    for version, numbers in (("3.10.2", (3, 10)), ("3.6.0+git12", (3, 6)), ("4", (4,))):
        assert triton_backend._numbers(version) == numbers


def on(device: str, kind: str = "ids", dtype: torch.dtype = torch.float32) -> Any:
    """What `supports` and `not_by_default` ask of a problem."""
    problem = problem_of(random_case(kind, dtype=dtype))
    names = ("compute_dtype", "heads", "classes", "dim", "cu_seqlens", "loss", "soft_labels")
    own = {name: getattr(problem, name) for name in names}
    return SimpleNamespace(device=torch.device(device), **own)


def test_what_it_does_not_take(machine, monkeypatch) -> None:
    machine()
    backend: Any = TritonBackend()
    assert (backend.name, backend.streams, backend.maps) == ("triton", True, False)
    assert backend.supports(on("cuda:1")) is None
    why = "features are on {}; Triton kernels read the memory of a GPU"
    for device in ("cpu", "meta"):
        assert backend.supports(on(device)) == why.format(device)
    double = "float64 features need float64 accumulators, which only torch has"
    assert backend.supports(on("cuda", dtype=torch.float64)) == double
    for kind in ("soft", "binary", "mse"):
        assert backend.supports(on("cuda", kind)) is None
    other = on("cuda")
    other.loss = "hinge"
    known = "the Triton kernels know cross_entropy, binary_cross_entropy, mse"
    assert backend.supports(other) == known
    refusal = (
        "regime 'recompute' cannot run this problem: it makes residuals again for cross-entropy "
        "with class ids alone"
    )
    for kind in ("soft", "binary", "mse"):
        assert TritonBackend("recompute").supports(on("cuda", kind)) == refusal
    assert TritonBackend("recompute").supports(on("cuda")) is None
    names = "row_tiles, few_classes, recompute, stored, blas"
    assert TritonBackend("fast").supports(on("cuda")) == (
        f"regime must be one of {names}; got 'fast'"
    )
    machine(interpret=True)
    assert backend.supports(on("cpu")) is None and backend.supports(on("meta")) is not None


def test_what_it_leaves_to_others_by_default(machine) -> None:
    backend: Any = TritonBackend()
    for capability in ((8, 0), (8, 9), (9, 0), (10, 3)):
        machine(capability=capability)
        assert backend.not_by_default(on("cuda")) is None
    why = "no test compiles its kernels for compute capability {}.{}"
    for capability in ((7, 5), (11, 0), (12, 1)):
        machine(capability=capability)
        assert backend.not_by_default(on("cuda")) == why.format(*capability)
    machine(interpret=True)
    assert backend.not_by_default(on("cpu")) == "the interpreter is for tests"


def test_reasons_line_by_line() -> None:
    problem = shape(20, 9, dtype=torch.bfloat16)
    rules = (
        Rule("stored", "no", max_width=19), Rule("stored", "no", max_dim=8),
        Rule("stored", "no", rounded=False), Rule("stored", "no", residuals_kept=False),
        Rule("recompute", "no", max_width=20, max_dim=9, rounded=True, residuals_kept=False),
        Rule("stored", "why so", max_width=20, max_dim=9, rounded=True, residuals_kept=True),
        Rule("blas", "never read"),
    )  # fmt: skip
    found = choose_regime(problem, True, rules=rules)
    assert found.regime is REGIMES["stored"] and found.reasons == (
        "stored: not used, K C = 20 is above 19",
        "stored: not used, D = 9 is above 8",
        "stored: not used, operands are rounded to bfloat16",
        "stored: not used, residuals are kept",
        "recompute: not used, residuals are kept",
        "stored: chosen, why so",
    )
    soft = problem_of(random_case("soft"))
    with pytest.raises(RuntimeError) as caught:
        choose_regime(soft, False, rules=(Rule("recompute", ""), Rule("blas", "", max_dim=1)))
    assert str(caught.value) == (
        "no regime can run this problem: recompute: not used, it makes residuals again for "
        "cross-entropy with class ids alone; blas: not used, D = 7 is above 1"
    )
    with pytest.raises(ValueError) as refused:
        choose_regime(soft, False, "recompute")
    assert str(refused.value) == (
        "regime 'recompute' cannot run this problem: it makes residuals again for cross-entropy "
        "with class ids alone"
    )
    forced = choose_regime(soft, False, "blas")
    assert (forced.regime, forced.reasons) == (REGIMES["blas"], ("blas: asked for",))


@needs_triton
def test_few_classes_wants_a_tile_of_either_pass(monkeypatch) -> None:
    """For this Triton; whether one for a newer Triton would do is said."""
    held: set[tuple[str, bool]] = set()
    monkeypatch.setattr(few_classes, "triton_version", lambda: (3, 7))
    monkeypatch.setattr(
        few_classes, "_default",
        lambda problem, which, version=None: (which, version is not None) in held,
    )  # fmt: skip
    what = "no tile holds C = 10 and D = 64"
    newer = f"{what} without spills in Triton 3.7"
    for given, said in (
        (["first", "second"], None),
        (["first", "newer first", "newer second"], newer),
        (["second", "newer first", "newer second"], newer),
        (["first", "newer first"], what), (["second", "newer second"], what), ([], what),
    ):  # fmt: skip
        held = {(one.rpartition(" ")[2], one.startswith("newer")) for one in given}
        assert REGIMES["few_classes"].fits(shape(10, 64)) == said, given


def test_who_names_a_regime(monkeypatch) -> None:
    names = "row_tiles, few_classes, recompute, stored, blas"
    monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "blas")
    assert triton_choice.forced_regime() == "blas"
    assert triton_choice.forced_regime("stored") == "stored"  # the argument first
    for named, source in ((None, "MOSO_FAST_TRITON_REGIME"), ("fast", "regime")):
        monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "fast")
        with pytest.raises(ValueError) as caught:
            triton_choice.forced_regime(named)
        assert str(caught.value) == f"{source} must be one of {names}; got 'fast'"
    monkeypatch.delenv("MOSO_FAST_TRITON_REGIME")
    assert triton_choice.forced_regime() is None


def test_a_prepared_job_carries_the_reasons(machine, monkeypatch) -> None:
    machine(interpret=True)
    monkeypatch.delenv("MOSO_FAST_TRITON_REGIME", raising=False)
    asked = []

    def chosen(problem: Any, kept: bool, forced: str | None) -> Any:
        asked.append((kept, forced))
        return triton_choice.Choice(REGIMES["blas"], ("one", "two"))

    monkeypatch.setattr(triton_backend, "choose_regime", chosen)
    problem = problem_of(random_case("ids"))
    for kept, named in ((True, None), (False, "stored")):
        plan = Plan(None, kept, 0, 0)
        passes = TritonBackend(named).prepare(problem, plan)
        assert (passes.reasons, passes.problem, passes.plan) == (("one", "two"), problem, plan)
        assert isinstance(passes, REGIMES["blas"])
    assert asked == [(True, None), (False, "stored")]


def test_names_of_operands() -> None:
    for dtype, precision, name in (
        (torch.float32, "highest", "float32"), (torch.float32, "high", "tf32"),
        (torch.float16, "medium", "tf32"), (torch.bfloat16, "medium", "bfloat16"),
        (torch.bfloat16, "high", "tf32"), (torch.bfloat16, "highest", "float32"),
    ):  # fmt: skip
        problem = problem_of(random_case("ids", dtype=dtype), precision=precision)
        assert triton_regime.operand_name(problem) == name


def test_other_devices_get_the_chunks_of_a_cpu() -> None:
    for device in ("cpu", "meta"):
        assert triton_regime.chunk_bytes(torch.device(device)) == 2**17


def test_capture_is_asked_for_on_a_gpu_alone(monkeypatch) -> None:
    for device, capturing in (("cuda", True), ("cuda", False), ("cpu", True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        job: Any = SimpleNamespace(device=torch.device(device))
        assert triton_regime.capturing(job) == (device == "cuda" and capturing)


@dataclass(frozen=True)
class Tile:
    rows: int
    num_warps: int = 4


TILES = (Tile(16), Tile(32), Tile(64))


def test_kinds_and_file_names(monkeypatch) -> None:
    assert autotune.kind("sum", 100, 512, torch.bfloat16, True) == "sum,128,512,torch.bfloat16,True"
    assert [autotune.kind("a", n, 1) for n in (1, 2, 3, 4, 5)] == [
        "a,1,1", "a,2,1", "a,4,1", "a,4,1", "a,8,1",
    ]  # fmt: skip
    monkeypatch.setattr(autotune, "_source_hash", lambda: "0123456789abcdef")
    assert autotune.cache_name(" NVIDIA H100 (80GB)+ ", "3.9.0") == (
        "tiles-nvidia-h100-80gb-triton-3.9.0-0123456789abcdef.json"
    )
    for value, asked in (("1", True), ("0", False), ("", False), ("yes", False)):
        monkeypatch.setenv("MOSO_FAST_AUTOTUNE", value)
        assert autotune.enabled() == asked


@needs_triton
def test_every_candidate_is_timed_seven_times(tmp_path) -> None:
    launched: list[int] = []
    timed: list[int] = []

    def timer(work: Any) -> float:
        work()
        timed.append(launched[-1])
        return {16: 3.0, 32: 1.0, 64: 2.0}[launched[-1]]

    path = tmp_path / "deep" / "er" / "tiles.json"
    cache = TileCache(path)
    assert cache.path == path
    found = cache.pick("k", TILES, TILES[2], lambda tile: launched.append(tile.rows), timer)
    assert found is TILES[1] and timed == [16, 32, 64] * 7 and launched[:3] == [16, 32, 64]
    assert path.read_text() == ('{\n "k": {\n  "num_warps": 4,\n  "rows": 32\n }\n}\n')
    cache.pick("a", TILES[:2], TILES[0], lambda tile: launched.append(tile.rows), timer)
    assert list(json.loads(path.read_text())) == ["a", "k"]


def said(path: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TileCache(path)
    assert all(one.category is RuntimeWarning for one in caught)
    return [str(one.message) for one in caught]


@needs_triton
def test_what_is_said_of_a_broken_cache(tmp_path) -> None:
    path = tmp_path / "tiles.json"
    assert said(path) == []
    again = "; tiles are searched for again and it is replaced"
    for content in ('{"k": 3}', "[1]", "null", '{"k": {}, "l": "x"}'):
        path.write_text(content)
        assert said(path) == [f"{path} cannot be read (not a table of tiles){again}"]
    path.write_text('{"a": {"rows": 1}, "b": [1, {"rows": 2}]}')
    assert said(path) == []
    path.write_text("{")
    (message,) = said(path)
    assert message.startswith(f"{path} cannot be read (Expecting ") and message.endswith(again)
    path.write_bytes(b'{"\xff": {}}')
    (message,) = said(path)
    assert message.startswith(f"{path} cannot be read ('utf-8' codec") and message.endswith(again)
    folder = tmp_path / "in its place"
    folder.mkdir()
    (message,) = said(folder)
    assert message.startswith(f"{folder} cannot be read ([Errno ") and message.endswith(again)


@needs_triton
def test_what_is_said_where_nothing_can_be_kept(tmp_path, monkeypatch) -> None:
    def refuse(path: Path) -> Any:
        raise OSError("disk full")

    monkeypatch.setattr(autotune, "atomic_path", refuse)
    cache = TileCache(tmp_path / "tiles.json")
    with pytest.warns(RuntimeWarning) as caught:
        found = cache.pick("k", TILES, TILES[0], lambda tile: None, lambda work: 1.0)
    assert [str(one.message) for one in caught] == [
        "the tiles found for this GPU cannot be kept (disk full); set MOSO_FAST_CACHE to a folder "
        "that can be written"
    ]
    assert found is TILES[0] and cache.pick("k", TILES, TILES[1], print, print) is TILES[0]


@needs_triton
def test_a_search_is_handed_on(monkeypatch) -> None:
    device, asked = torch.device("cuda", 1), []
    monkeypatch.setenv("MOSO_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cache = SimpleNamespace(pick=lambda *given: asked.append(given) or TILES[2])
    monkeypatch.setattr(autotune, "cache_of", lambda of: {device: cache}[of])
    monkeypatch.setattr(autotune, "device_timer", lambda of: ("timer", of))
    assert autotune.tile_for(device, "k", TILES, TILES[0], print) is TILES[2]
    assert asked == [("k", TILES, TILES[0], print, ("timer", device))]


@needs_triton
def test_the_cache_of_a_gpu(monkeypatch, tmp_path) -> None:
    import triton

    entered = []
    monkeypatch.setattr(torch.cuda, "device",
                        lambda of: entered.append(of) or contextlib.nullcontext())  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setenv("MOSO_FAST_CACHE", str(tmp_path))
    device = torch.device("cuda", 1)
    found = autotune.cache_of.__wrapped__(device)
    assert found.path == tmp_path / autotune.cache_name("NVIDIA H200", triton.__version__)
    assert entered == [device]
