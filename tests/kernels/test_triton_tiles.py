"""Which tiles the regimes of the Triton backend take: what a tile holds, what a GPU holds."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from core_support import prepared, random_case
from triton_cases import needs_triton, problem_of, shape

from moso_fast.backends.triton import products as triton_products
from moso_fast.backends.triton.backend import TritonBackend
from moso_fast.backends.triton.choice import REGIMES, RULES, choose_regime
from moso_fast.backends.triton.regime import Limits
from moso_fast.backends.triton.regimes import few_classes as triton_few_classes
from moso_fast.core.problem import build_problem


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
