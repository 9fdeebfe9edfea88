"""The Triton backend as machines with and without a GPU see it; its numbers in the interpreter."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core_support import Case, chunk_rows, prepared, random_case
from interpreter import run_interpreted, run_python

import moso_fast
from moso_fast.backends import choose, get
from moso_fast.backends import torch as torch_backend
from moso_fast.backends.cuda import device as cuda_device
from moso_fast.backends.triton import backend as triton_backend
from moso_fast.backends.triton import choice as triton_choice
from moso_fast.backends.triton import products as triton_products
from moso_fast.backends.triton import regime as triton_regime
from moso_fast.backends.triton.backend import TritonBackend, operand_dtype
from moso_fast.backends.triton.choice import REGIMES, RULES, Rule, choose_regime
from moso_fast.backends.triton.regime import CHUNK_BYTES, SLAB_ROWS, TESTED_MAJORS, Limits
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.backends.triton.regimes import few_classes as triton_few_classes
from moso_fast.backends.triton.regimes import recompute as triton_recompute
from moso_fast.backends.triton.regimes import row_tiles as triton_row_tiles
from moso_fast.core import memory
from moso_fast.core.memory import make_plan
from moso_fast.core.passes import Plan
from moso_fast.core.problem import build_problem
from moso_fast.functional import explain, moso_scores


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Set what the backend finds: version (None: not installed), CUDA device, ROCm, interpreter."""

    def set_up(
        version: str | None = "3.9.0",
        *,
        cuda: bool = True,
        hip: str | None = None,
        interpret: bool = False,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        monkeypatch.setattr(triton_backend, "_installed", lambda: version is not None)
        monkeypatch.setattr(triton_backend, "_version", lambda: version)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        limits = Limits(227 * 1024, capability)
        for module in (
            triton_few_classes,
            triton_products,
            triton_recompute,
            triton_row_tiles,
        ):
            monkeypatch.setattr(module, "limits_of", lambda device: limits)
        monkeypatch.setattr(cuda_device, "shared_limit", lambda device: limits.shared_bytes)
        monkeypatch.setattr(cuda_device, "index", lambda device: 0)
        monkeypatch.setattr(cuda_device, "capability", lambda index: capability)
        if interpret:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        else:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return set_up


class _On:
    """A problem whose features claim to lie on another device."""

    def __init__(self, problem, device: str) -> None:
        self._problem, self.device = problem, torch.device(device)

    def __getattr__(self, name: str):
        return getattr(self._problem, name)


def problem_of(case: Case, **options):
    return build_problem(*case.args, **case.options, **options)


@pytest.mark.parametrize(
    "setting, available, reason, how",
    [
        ({"version": None}, False, "Triton is not installed", 'pip install "triton>=3.6"'),
        ({"version": "3.5.1"}, False, "3.5.1 is older than 3.6", 'pip install "triton>=3.6"'),
        ({"version": "2.10.0+git"}, False, "older than 3.6", 'pip install "triton>=3.6"'),
        ({"cuda": False}, False, "finds no CUDA device", "NVIDIA GPU"),
        ({"hip": "6.4"}, False, "tested for NVIDIA GPUs only", "backend='torch'"),
        ({}, True, "Triton 3.9.0, kernels tested", ""),
        ({"version": "3.6.0"}, True, "Triton 3.6.0, kernels tested", ""),
        ({"version": "3.10.0"}, True, "Triton 3.10.0", ""),
        ({"cuda": False, "interpret": True}, True, "in its interpreter, for tests", ""),
    ],
)
def test_availability_says_why_and_how(machine, setting, available, reason, how) -> None:
    machine(**setting)
    found = moso_fast.backends()["triton"]
    assert found.available == available
    assert reason in found.reason and how in found.how
    assert bool(found.how) != available


def test_version_is_that_of_the_installed_package() -> None:
    triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    assert triton_backend._version() == triton.__version__
    assert triton_backend._installed()


def test_supports(machine) -> None:
    machine()
    backend = TritonBackend()
    problem = problem_of(random_case("ids"))
    assert "features are on cpu" in backend.supports(problem)
    assert backend.supports(_On(problem, "cuda:1")) is None
    double = problem_of(random_case("ids", dtype=torch.float64))
    assert "float64" in backend.supports(_On(double, "cuda"))
    machine(interpret=True)
    assert backend.supports(problem) is None
    assert "float64" in backend.supports(double)
    assert "features are on meta" in backend.supports(_On(problem, "meta"))


@pytest.mark.parametrize(
    "capability, proven", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True),
                           ((10, 0), True), ((12, 0), False)]
)  # fmt: skip
def test_default_on_a_gpu_where_the_kernels_are_proven(machine, capability, proven) -> None:
    machine(capability=capability)
    # More classes than the CUDA C++ kernels take, where they are built.
    problem = _On(problem_of(random_case("ids", c=130)), "cuda")
    backend, reasons = choose(problem)
    assert backend.name == ("triton" if proven else "torch")
    if proven:
        assert "triton: chosen, Triton 3.9.0, kernels tested by interpreter" in reasons[-1]
    else:
        (reason,) = (line for line in reasons if line.startswith("triton: "))
        assert f"compute capability {capability[0]}.{capability[1]}" in reason
        assert choose(problem, "triton")[0].name == "triton"  # asked for by name it runs


def test_what_is_proven_is_what_the_compiler_test_covers() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from aot import ARCHITECTURES

    assert {arch // 10 for arch in ARCHITECTURES} == set(TESTED_MAJORS)


def test_float64_on_a_gpu_falls_to_torch_with_the_reason(machine) -> None:
    machine()
    backend, reasons = choose(_On(problem_of(random_case("ids", dtype=torch.float64)), "cuda"))
    assert backend.name == "torch"
    assert any(reason.startswith("triton: not used, float64") for reason in reasons)


def test_refused_by_name_on_a_machine_without_a_gpu(machine, monkeypatch) -> None:
    machine(cuda=False)
    case = random_case("ids")
    with pytest.raises(ValueError, match=r"^backend='triton' cannot run this problem: .*no CUDA"):
        moso_scores(*case.args, backend="triton")
    monkeypatch.setenv("MOSO_FAST_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"^MOSO_FAST_BACKEND=triton cannot run this problem"):
        moso_scores(*case.args)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="must be one of auto, cpu, triton, cuda, torch; got 'cu'"):
        get("cu")


@pytest.mark.parametrize(
    "dtype, precision, operand",
    [
        (torch.float32, "highest", torch.float32),
        (torch.float32, "medium", torch.float32),
        (torch.bfloat16, "medium", torch.bfloat16),
        (torch.bfloat16, "high", torch.float32),
        (torch.bfloat16, "highest", torch.float32),
        (torch.float16, "medium", torch.float32),
    ],
)
def test_operands(dtype, precision, operand) -> None:
    problem = problem_of(random_case("ids", dtype=dtype), precision=precision)
    assert operand_dtype(problem) == operand
    assert problem_of(random_case("ids", dtype=torch.bfloat16)).precision == "medium"


def test_chunks_stay_within_their_budget(monkeypatch) -> None:
    monkeypatch.setattr(memory, "residual_budget", lambda device: 2**36)
    backend, budget = TritonBackend("blas"), CHUNK_BYTES["cuda"]
    for classes, dim in ((10, 512), (1000, 2048), (128_256, 4096)):
        features = torch.zeros(1, dim).expand(4, dim)
        weight = torch.zeros(1, dim).expand(classes, dim)
        problem = build_problem(features, weight, torch.zeros(4).long())
        rows = chunk_rows(backend, _On(problem, "cuda"))
        assert rows > 2000 and rows * classes * 8 <= budget
        assert chunk_rows(backend, problem) * classes * 8 <= 2**18 or classes > 2**16
    tall = build_problem(torch.zeros(4, 1), torch.zeros(1, 1), torch.zeros(4).long())
    assert chunk_rows(backend, _On(tall, "cuda")) * 8 <= budget


def test_a_chunk_takes_no_more_than_an_eighth_of_a_small_gpu(monkeypatch) -> None:
    """And a power of two: GPUs of one kind differ by what their driver keeps."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gib, expected in ((139, 8), (79.2, 8), (47.5, 4), (39.6, 4), (23.7, 2), (15.9, 1)):
        described = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, d=described: d)
        assert triton_regime.chunk_bytes(torch.device("cuda")) == expected * 2**30, gib
        assert triton_regime.chunk_bytes(torch.device("cpu")) == CHUNK_BYTES["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_regime.chunk_bytes(torch.device("cuda")) == CHUNK_BYTES["cuda"]


def shape(
    classes: int,
    dim: int,
    heads: int = 1,
    rows: int = 4,
    dtype: torch.dtype = torch.float32,
    **options,
):
    """A problem of this shape without its memory."""
    weight = torch.zeros(1, 1, 1).expand(heads, classes, dim)
    features = torch.zeros(1, 1, dtype=dtype).expand(rows, dim)
    return build_problem(features, weight, torch.zeros(rows).long(), **options)


def test_every_rule_names_a_regime_and_says_why() -> None:
    assert {rule.regime for rule in RULES} == set(REGIMES)
    source = re.compile(r"(measured( kernel by kernel)? on an \S+|modelled, not measured.*?): ")
    for rule in RULES:
        # Where the bounds come from, and what was found.
        found = source.match(rule.why)
        assert found and len(rule.why) > found.end() + 20 and "\n" not in rule.why, rule.regime
    last = RULES[-1]
    assert (last.max_width, last.max_dim) == (None, None)
    assert (last.rounded, last.residuals_kept) == (None, None)


needs_triton = pytest.mark.skipif(
    not triton_backend._installed(), reason="Triton has no wheel for this platform"
)


@needs_triton
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("classes", [1, 10, 100, 257, 1000, 16_384, 16_385, 128_256])
@pytest.mark.parametrize("dim", [1, 512, 4096])
def test_every_problem_finds_a_regime_that_fits(classes, dim, kept) -> None:
    problem = shape(classes, dim)
    choice = choose_regime(problem, kept)
    assert choice.regime.fits(problem) is None
    chosen = [rule for rule in RULES if rule.regime == choice.regime.name]
    assert choice.reasons[-1] in [f"{rule.regime}: chosen, {rule.why}" for rule in chosen]
    assert all("not used, " in reason for reason in choice.reasons[:-1])
    job = choice.regime(problem, make_plan(problem, None))
    assert job.row_bytes() > 0 and job.fixed_bytes() >= 0 and job.describe()


@needs_triton
@pytest.mark.parametrize(
    "classes, dim, heads, kept, rounded, wide",  # with bfloat16 products, with float32 ones
    [
        (10, 512, 1, True, "row_tiles", "blas"),
        (64, 512, 1, True, "row_tiles", "blas"),
        (65, 512, 1, True, "stored", "blas"),
        (256, 512, 1, True, "stored", "blas"),
        (257, 512, 1, True, "blas", "blas"),
        (128_256, 4096, 1, True, "blas", "blas"),
        (10, 512, 3, True, "few_classes", "blas"),
        (100, 512, 3, True, "blas", "blas"),
        (257, 1024, 1, False, "recompute", "recompute"),
        (257, 1025, 1, False, "blas", "blas"),
        (65, 1025, 1, False, "stored", "blas"),
    ],
)
def test_the_table(classes, dim, heads, kept, rounded, wide, machine, monkeypatch) -> None:
    monkeypatch.setattr(triton_few_classes, "triton_version", lambda: (3, 9))
    machine()
    for dtype, expected in ((torch.bfloat16, rounded), (torch.float32, wide)):
        problem = shape(classes, dim, heads, dtype=dtype, precision="medium")
        assert choose_regime(problem, kept).regime.name == expected, dtype


def test_rules_may_ask_for_rounded_operands() -> None:
    rules = (Rule("stored", "for the test", rounded=True), Rule("blas", "for the test"))
    found = choose_regime(shape(3, 5), True, rules=rules)
    assert found.reasons[0] == "stored: not used, operands are float32"
    assert choose_regime(shape(3, 5, dtype=torch.bfloat16), True, rules=rules).regime.name == (
        "stored"
    )
    rules = (Rule("stored", "for the test", rounded=False), rules[1])
    found = choose_regime(shape(3, 5, dtype=torch.bfloat16), True, rules=rules)
    assert found.reasons[0] == "stored: not used, operands are rounded to bfloat16"


def test_the_first_rule_whose_bounds_hold_decides() -> None:
    why = "modelled, not measured: for the test"
    rules = (
        Rule("stored", why, max_width=20, max_dim=8, residuals_kept=True),
        Rule("blas", why),
    )

    def chosen(*arguments: int, kept: bool = True) -> tuple[str, str]:
        choice = choose_regime(shape(*arguments), kept, rules=rules)
        return choice.regime.name, choice.reasons[0]

    assert chosen(20, 8)[0] == "stored"
    assert chosen(21, 8) == ("blas", "stored: not used, K C = 21 is above 20")
    assert chosen(7, 8, 3) == ("blas", "stored: not used, K C = 21 is above 20")
    assert chosen(20, 9) == ("blas", "stored: not used, D = 9 is above 8")
    assert chosen(20, 8, kept=False) == ("blas", "stored: not used, residuals are not kept")


@needs_triton
def test_few_classes_take_no_tile_that_spills_in_this_triton(machine, monkeypatch) -> None:
    problem, regime = shape(10, 512), REGIMES["few_classes"]
    monkeypatch.setattr(triton_few_classes, "triton_version", lambda: (3, 8))
    machine()
    why = "no tile holds C = 10 and D = 512 without spills in Triton 3.8"
    assert regime.fits(problem) == why
    rules = [dataclasses.replace(rule, rounded=None) for rule in RULES[1:]]
    found = choose_regime(problem, True, rules=rules)
    assert found.regime.name == "stored" and found.reasons[0] == f"few_classes: not used, {why}"
    assert regime.fits(shape(10, 256)) is None
    assert regime.fits(shape(200, 256)) == "no tile holds C = 200 and D = 256"
    machine(interpret=True)
    assert regime.fits(problem) is None
    monkeypatch.setattr(triton_few_classes, "triton_version", lambda: (3, 10))
    machine()
    assert regime.fits(problem) is None
    assert "no tile holds C = 200 and D = 512" in regime.fits(shape(200, 512))


@needs_triton
def test_a_regime_can_be_forced(machine, monkeypatch) -> None:
    machine(interpret=True)
    problem = problem_of(random_case("ids"))
    for name in REGIMES:
        monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", name)
        assert choose_regime(problem, True, triton_choice.forced_regime()).regime.name == name
        assert f"regime {name}, " in prepared("triton", problem).describe()
        monkeypatch.delenv("MOSO_FAST_TRITON_REGIME")
        assert f"regime {name}, " in prepared(TritonBackend(name), problem).describe()
    monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "")
    assert triton_choice.forced_regime() is None
    monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "fast")
    known = ", ".join(REGIMES)
    message = f"MOSO_FAST_TRITON_REGIME must be one of {known}; got 'fast'"
    assert TritonBackend().supports(problem) == message
    with pytest.raises(ValueError, match=f"cannot run this problem: {message}"):
        moso_scores(*random_case("ids").args, backend="triton")


@needs_triton
def test_explain_says_regime_tiles_reads_memory_and_reasons(machine, monkeypatch) -> None:
    machine(interpret=True)
    monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "stored")
    text = explain(*random_case("ids", n=300, c=9, d=40).args, backend="triton")
    assert "plan      triton: regime stored, float32 logits by cuBLAS, residuals in place" in text
    assert "R^T H tile " in text and "stored: asked for" in text
    assert "features read 4 times in all; at most about " in text and "MiB beyond" in text
    monkeypatch.delenv("MOSO_FAST_TRITON_REGIME")
    text = explain(*random_case("ids").args, backend="triton")
    assert any(f"{rule.regime}: chosen, {rule.why}" in text for rule in RULES)


@needs_triton
def test_row_tiles_takes_one_head_whose_classes_a_tile_holds(machine) -> None:
    from moso_fast.kernels.row_tiles import TILES

    machine(interpret=True)
    regime = REGIMES["row_tiles"]
    assert regime.fits(shape(10, 512)) is None
    assert regime.fits(shape(10, 512, 3)) == "it takes one head, and they share the features"
    sequences = build_problem(
        torch.zeros(1, 1).expand(4, 8), torch.zeros(1, 1, 1).expand(1, 10, 8),
        torch.zeros(4).long(), cu_seqlens=torch.tensor([0, 1, 4]),
    )  # fmt: skip
    assert regime.fits(sequences) == "samples of several rows need every residual in float32"
    # Widest tile for float32 products (the default of float32 features), rows aligned or not.
    for dim, aligned in ((512, True), (511, False)):
        kind = ("tf32x3", aligned)
        widest = max(c.tile.classes for c in TILES if (c.products, c.aligned) == kind)
        assert regime.fits(shape(widest, dim)) is None
        why = f"no tile holds C = {widest + 1} with these operands"
        assert regime.fits(shape(widest + 1, dim)) == why
        assert choose_regime(shape(widest + 1, dim), True).regime.name != "row_tiles"


@needs_triton
def test_row_tiles_says_which_tiles_and_how_much_memory(machine) -> None:
    machine(interpret=True)
    regime = TritonBackend("row_tiles")
    wide = prepared(regime, problem_of(random_case("ids", n=300, c=10, d=64)))
    narrow = random_case("ids", n=300, c=10, d=64, dtype=torch.bfloat16)
    narrow = prepared(regime, problem_of(narrow))
    assert wide.kernels().startswith("tf32x3 products, rows tile ")
    assert narrow.kernels().startswith("bf16 products, rows tile ")
    assert "R^T H tile " in narrow.kernels()
    assert wide.state_bytes() == 0 and narrow.state_bytes() == 4 * 300
    assert narrow.row_bytes() < wide.row_bytes()
    turned = problem_of(random_case("ids", n=64, c=10, d=64))
    turned = build_problem(turned.features.T, turned.weight, turned.labels)
    assert prepared(regime, turned).row_bytes() == wide.row_bytes() + 64 * 4  # copied


@needs_triton
def test_peak_memory_is_what_a_chunk_and_the_residuals_take(monkeypatch) -> None:
    problem = shape(10, 512, rows=1000)
    job = TritonBackend("blas").prepare(problem, Plan(None, True, 40_000, 0))
    numbers = problem.weight.numel()
    assert job.fixed_bytes() == 20 * numbers  # two float64 sums, one float32
    expected = 40_000 + 100 * job.row_bytes() + (20 + 12) * numbers
    assert f"at most about {expected / 2**20:.1f} MiB" in job.explain(100)[-1]
    two_slabs = prepared(TritonBackend("blas"), shape(10, 512, rows=2 * SLAB_ROWS["highest"] + 1))
    assert two_slabs.fixed_bytes() == (16 + 2 * 4) * numbers
    monkeypatch.setattr(triton_blas, "_BATCH_BYTES", 8 * numbers - 1)  # one slab after the other
    assert two_slabs.fixed_bytes() == (16 + 4) * numbers


@pytest.mark.parametrize(
    "wanted, limits, expected",
    [
        ("large", Limits(227 * 1024, (9, 0)), "large"),
        ("large", Limits(99 * 1024, (8, 9)), "medium"),
        ("newer", Limits(227 * 1024, (9, 0)), "newer"),
        ("newer", Limits(163 * 1024, (8, 0)), "medium"),
        ("large", Limits(48 * 1024, (8, 0)), "any row"),
        ("large", Limits(1024, (8, 0)), "large"),  # nothing fits: the launch says so
    ],
)
def test_a_tile_that_the_gpu_cannot_hold_is_not_launched(monkeypatch, wanted, limits, expected):
    def choice(name: str, aligned: bool, kib: int, majors: tuple[int, ...]) -> SimpleNamespace:
        tile = SimpleNamespace(name=name, shared_bytes=1024 * kib)
        return SimpleNamespace(rounded=True, aligned=aligned, tile=tile, majors=majors)

    choices = [
        choice("medium", True, 90, (8, 9, 10)), choice("large", True, 120, (8, 9, 10)),
        choice("newer", True, 100, (9, 10)), choice("any row", False, 30, (8, 9, 10)),
    ]  # fmt: skip
    monkeypatch.setattr(triton_products, "limits_of", lambda device: limits)
    by_name = {choice.tile.name: choice.tile for choice in choices}
    found = triton_products.pick_tile(
        problem_of(random_case("ids")), "key", choices, by_name[wanted], (True, True), print
    )
    assert found.name == expected


@needs_triton
@pytest.mark.parametrize("capability", [(7, 5), (11, 0), (12, 0)])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_gpu_of_another_generation_gets_the_tiles_of_the_oldest(
    machine, monkeypatch, regime, capability
) -> None:
    """Asked for by name, the backend runs there too."""
    machine(capability=capability)
    problem = problem_of(random_case("ids"))
    found = prepared(TritonBackend(regime), problem).describe()
    machine(capability=(8, 0))
    assert found == prepared(TritonBackend(regime), problem).describe()
    tile = SimpleNamespace(name="newer", shared_bytes=1024)
    choices = [SimpleNamespace(rounded=True, aligned=True, tile=tile, majors=(9, 10))]
    monkeypatch.setattr(triton_products, "limits_of", lambda device: Limits(99 * 1024, capability))
    oldest = SimpleNamespace(name="oldest", shared_bytes=1024)
    choices.append(SimpleNamespace(rounded=True, aligned=True, tile=oldest, majors=(8, 9, 10)))
    arguments = (problem, "key", choices, oldest, (True, True), print)
    assert triton_products.pick_tile(*arguments).name == "oldest"


@pytest.mark.exhaustive
def test_import_and_availability_do_not_import_triton(tmp_path: Path) -> None:
    code = (
        "import sys, moso_fast; moso_fast.backends(); "
        "sys.exit('triton' in sys.modules and 'Triton was imported')"
    )
    run_python(code, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "file", ["test_triton_scoring.py", "test_triton_memory.py", "test_triton_narrow.py"]
)
def test_whole_path_in_interpreter(file: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    run_interpreted(file, tmp_path)


def test_rows_are_aligned_by_address_stride_and_length() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from moso_fast.kernels.operands import aligned

    for dtype, line in ((torch.float32, 4), (torch.bfloat16, 8)):  # numbers in 16 bytes
        matrix = torch.zeros(8, 6 * line, dtype=dtype)
        assert matrix.data_ptr() % 16 == 0 and aligned(matrix)
        assert aligned(matrix[1:, line : 3 * line])
        assert not aligned(matrix[:, 1 : 1 + line])  # begins elsewhere
        assert not aligned(matrix[:, : line + 1])  # ends elsewhere
        assert not aligned(torch.zeros(8, line + 1, dtype=dtype)[:, :line])  # the next row does


@pytest.mark.parametrize("rows", [SLAB_ROWS["highest"], torch_backend._SLAB_ROWS["cuda"]])
def test_slabs_of_cublas_are_short_enough_for_float32_sums(rows: int) -> None:
    """Equal rows, added one after the other: every sum is rounded the same way."""
    terms = 2.0 ** np.random.default_rng(0).uniform(0, 1, 10_000)
    sums = np.zeros_like(terms, dtype=np.float32)
    for _ in range(rows):
        sums = (sums + terms).astype(np.float32)
    assert np.abs(sums / (rows * terms) - 1).max() < 1e-5
