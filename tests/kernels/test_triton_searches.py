"""What a search for tiles is asked: kind of launch, candidates, default. Tables of our own.

Kernels are plain PyTorch here; a search that nobody has asked for gives the default.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import Case, generator
from plain_kernels import PlainKernels
from triton_cases import needs_triton

from moso_fast.backends.triton import products
from moso_fast.backends.triton.backend import TritonBackend
from moso_fast.backends.triton.regime import Limits
from moso_fast.backends.triton.regimes import few_classes
from moso_fast.core import engine
from moso_fast.core.precision import own_precision
from moso_fast.core.problem import build_problem

pytestmark = needs_triton
BF16 = torch.bfloat16
LARGE = 228 * 1024  # bytes: no block of compute capability 9.0 has so many
ALL = (8, 9, 10)


@pytest.fixture
def kernels(machine, monkeypatch: pytest.MonkeyPatch) -> PlainKernels:
    machine(interpret=True)
    return PlainKernels(monkeypatch)


def job_of(classes: int, dim: int, heads: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    g = generator(classes + dim)
    features = torch.randn(20, dim, generator=g).to(dtype)
    weight = torch.randn(heads, classes, dim, generator=g)
    return Case(features, weight, torch.arange(20) % classes, None)


class Kept(TritonBackend):
    """Keeps the job that it prepared last."""

    passes: Any

    def prepare(self, problem: Any, plan: Any) -> Any:
        self.passes = super().prepare(problem, plan)
        return self.passes


def searches(kernels: PlainKernels, regime: str, case: Case, **options: Any) -> dict[str, Any]:
    """What is searched for in a job, by the kernel."""
    kernels.searches.clear()
    problem, backend = build_problem(*case.args, **options), Kept(regime)
    with own_precision(problem):
        engine.run(problem, backend)
    found = {search.key.partition(",")[0]: search for search in kernels.searches}
    # Picked once for a job, and kept by names that no two launches of it share.
    picked = {
        f"narrow_{name}" if search.key.endswith(",narrow") else name: search.default
        for name, search in found.items()
    }
    assert len(found) == len(kernels.searches) and backend.passes._tiles == picked
    assert all(search.device == torch.device("cpu") for search in kernels.searches)
    return found


def named(candidates: Any) -> list[str]:
    return [getattr(one, "tile", one).name for one in candidates]


def choice(name: str, size: int = 1, classes: int = 64, dim: int = 64, **more: Any) -> Any:
    tile = SimpleNamespace(name=name, shared_bytes=size, classes=classes, dim=dim)
    return SimpleNamespace(tile=tile, **{"majors": ALL, **more})


def tiles_of_products(patch: pytest.MonkeyPatch, module: Any, *tables: str, **more: Any) -> None:
    """Of every kind of operands a small tile, one that is too large, one of newer GPUs alone."""
    made = []
    for rounded in (False, True):
        for aligned in (False, True):
            kind = f"{'rounded' if rounded else 'exact'} {'aligned' if aligned else 'any'}"
            own = {"rounded": rounded, "aligned": aligned, **more}
            made += [choice(f"{kind} narrow", classes=1, **own), choice(kind, **own),
                     choice(f"{kind} large", LARGE, **own),
                     choice(f"{kind} newest", **own, majors=(10,))]  # fmt: skip
    for table in tables:
        patch.setattr(module, table, tuple(made))


def of_kind(name: str) -> list[str]:
    """Candidates: of a kind that fit, the one that the table wants and a narrower one."""
    return [name] if name == "narrow" else [f"{name} narrow", name]


def test_the_gradient_sum(kernels, monkeypatch) -> None:
    from moso_fast.kernels import gradient_sum

    tiles_of_products(monkeypatch, gradient_sum, "TILES", narrow=False)
    narrow = choice("narrow", rounded=True, aligned=True, narrow=True)
    monkeypatch.setattr(gradient_sum, "TILES", (*gradient_sum.TILES, narrow))
    f32, half = "torch.float32,highest,False", "torch.bfloat16,medium,True"
    for case, key, name in (
        (job_of(8, 12), f"8,16,{f32},True", "exact aligned"),
        (job_of(8, 4, 3), f"32,4,{f32},True", "exact aligned"),
        (job_of(5, 12), f"8,16,{f32},False", "exact any"),
        (job_of(8, 11), f"8,16,{f32},False", "exact any"),
        (job_of(8, 8, 2, BF16), f"16,8,{half},True", "rounded aligned"),
        (job_of(8, 9, 2, BF16), f"16,16,{half},False", "rounded any"),
        (job_of(8, 8, 1, BF16), f"8,8,{half},True,narrow", "narrow"),
        (job_of(9, 8, 1, BF16), f"16,8,{half},True,narrow", "narrow"),  # rows of 16
        (job_of(8, 9, 1, BF16), f"8,16,{half},False,narrow", "rounded any"),
    ):
        search = searches(kernels, "stored", case)["gradient_sum"]
        assert search.key == f"gradient_sum,{key}"
        assert (named(search.candidates), search.default.name) == (of_kind(name), name), key
        assert kernels.of("gradient_sum")[-1].tile is search.default
        again = search.launch("another tile")
        call = kernels.of("gradient_sum")[-1]
        assert call.tile == "another tile" and again.grad.equal(call.returned.grad)
        assert call.precision == ("highest" if "highest" in key else "medium")
        assert call.bias == ("narrow" not in key) and call.counted.tolist() == [True] * 20


def test_the_alignment_of_stored_residuals(kernels, monkeypatch) -> None:
    """H G^T for no more classes than columns, else R G: each has a table of its own."""
    from moso_fast.kernels import stored_alignment as module

    for table, dim in (("PROJECT_TILES", 1), ("PULL_TILES", 2)):
        tiles_of_products(monkeypatch, module, table, dim=dim)
    exact, half = "torch.float32,highest", "torch.bfloat16,medium"
    rounded = "rounded aligned"
    for case, key, name, dim in (
        (job_of(8, 12), f"8,16,1,{exact},True,False,True,torch.float32", "exact aligned", 1),
        (job_of(8, 8), f"8,8,1,{exact},True,False,True,torch.float32", "exact aligned", 1),
        (job_of(12, 8, 3), f"16,8,3,{exact},False,False,True,torch.float32", "exact aligned", 2),
        (job_of(7, 8), f"8,8,1,{exact},True,False,False,torch.float32", "exact any", 1),
        (job_of(6, 8, 2), f"8,8,2,{exact},True,False,False,torch.float32", "exact any", 1),
        (job_of(8, 9), f"8,16,1,{exact},True,False,False,torch.float32", "exact any", 1),
        (job_of(8, 8, 2, BF16), f"8,8,2,{half},True,True,True,torch.float32", rounded, 1),
        (job_of(7, 8, 1, BF16), f"8,8,1,{half},True,True,True,torch.bfloat16", rounded, 1),
        (job_of(8, 9, 1, BF16), f"8,16,1,{half},True,True,False,torch.bfloat16", "rounded any", 1),
    ):
        search = searches(kernels, "stored", case)["stored_alignment"]
        assert search.key == f"stored_alignment,{key}"
        assert (named(search.candidates), search.default.name) == (of_kind(name), name), key
        assert search.default.dim == dim
        search.launch("another tile")
        call = kernels.of("stored_alignment")[-1]
        assert call.tile == "another tile"
        assert call.precision == ("highest" if exact in key else "medium")


def test_the_alignment_of_residuals_made_again(kernels, monkeypatch) -> None:
    from moso_fast.kernels import stacked_alignment as module

    tiles_of_products(monkeypatch, module, "TILES")
    exact, half = "torch.float32,highest", "torch.bfloat16,medium"
    for case, key, name in (
        (job_of(8, 12), f"8,16,1,{exact},False,True", "exact aligned"),
        (job_of(5, 12, 2), f"8,16,2,{exact},False,True", "exact aligned"),
        (job_of(8, 11), f"8,16,1,{exact},False,False", "exact any"),
        (job_of(8, 8, 1, BF16), f"8,8,1,{half},True,True", "rounded aligned"),
        (job_of(8, 12, 1, BF16), f"8,16,1,{half},True,False", "rounded any"),
    ):
        search = searches(kernels, "recompute", case)["stacked_alignment"]
        assert search.key == f"stacked_alignment,{key}"
        assert (named(search.candidates), search.default.name) == (of_kind(name), name), key
        search.launch("another tile")
        call = kernels.of("stacked_alignment")[-1]
        assert call.tile == "another tile"
        assert call.precision == ("highest" if exact in key else "medium")


def test_rows_in_one_tile(kernels, monkeypatch) -> None:
    """Of the right kind, and no more than twice as wide as the first that holds the classes."""
    from moso_fast.kernels import row_tiles as module

    every = {"products": "tf32x3", "aligned": True, "losses": ("ids", "soft")}
    monkeypatch.setattr(module, "TILES", (
        choice("too narrow", 1, 7, **every), choice("first", 1, 8, **every),
        choice("twice", 1, 16, **every), choice("more", 1, 17, **every),
        choice("large", LARGE, 8, **every), choice("newest", 1, 8, **every | {"majors": (10,)}),
        choice("other loss", 1, 8, **every | {"losses": ("squared",)}),
        choice("any row", 1, 8, **every | {"aligned": False}),
        choice("rounded", 1, 8, **every | {"products": "bf16"}),
        choice("rounded, any row", 1, 8, **every | {"products": "bf16", "aligned": False}),
        choice("leading digits", 1, 8, **every | {"products": "tf32"}),
    ))  # fmt: skip
    for case, options, key, names in (
        (job_of(8, 12), {}, "8,16,cross_entropy,torch.float32,tf32x3,True", ["first", "twice"]),
        (job_of(8, 11), {}, "8,16,cross_entropy,torch.float32,tf32x3,False", ["any row"]),
        (job_of(8, 12), {"precision": "medium"}, "8,16,cross_entropy,torch.float32,tf32,True",
         ["leading digits"]),
        (job_of(8, 8, 1, BF16), {}, "8,8,cross_entropy,torch.bfloat16,bf16,True", ["rounded"]),
        (job_of(8, 12, 1, BF16), {}, "8,16,cross_entropy,torch.bfloat16,bf16,False",
         ["rounded, any row"]),
    ):  # fmt: skip
        search = searches(kernels, "row_tiles", case, **options)["row_tiles"]
        assert search.key == f"row_tiles,{key}"
        assert (named(search.candidates), search.default.name) == (names, names[0]), key
        search.launch("another tile")
        call = kernels.of("row_tiles")[-1]
        assert call.tile == "another tile" and call.precision == build_problem(
            *case.args, **options
        ).precision  # fmt: skip


def test_few_classes(kernels, monkeypatch) -> None:
    """A tile of the first pass holds a row of features, one of the second does not."""
    from moso_fast.kernels import few_classes_tiles as module

    every = {"products": "tf32x3", "aligned": True, "since": (3, 6)}
    made = (
        choice("narrow", 1, 4, 16, **every), choice("short", 1, 8, 8, **every),
        choice("fits", 1, 8, 16, **every), choice("wider", 1, 32, 64, **every),
        choice("large", LARGE, 8, 16, **every),
        choice("later", 1, 8, 16, **every | {"since": (3, 9)}),
        choice("any row", 1, 8, 16, **every | {"aligned": False}),
        choice("rounded", 1, 8, 16, **every | {"products": "bf16"}),
    )  # fmt: skip
    for table in ("FIRST_TILES", "SECOND_TILES"):
        monkeypatch.setattr(module, table, made)
    monkeypatch.setattr(few_classes, "_version", lambda: (3, 8))
    loss = "cross_entropy"
    for case, key, first, second in (
        (job_of(8, 12), f"8,16,1,{loss},torch.float32,tf32x3,True", ["fits", "wider"],
         ["short", "fits", "wider"]),
        (job_of(8, 12, 2), f"8,16,2,{loss},torch.float32,tf32x3,True", ["fits", "wider"],
         ["short", "fits", "wider"]),
        (job_of(8, 11), f"8,16,1,{loss},torch.float32,tf32x3,False", ["any row"], ["any row"]),
        (job_of(8, 8, 1, BF16), f"8,8,1,{loss},torch.bfloat16,bf16,True", ["rounded"], ["rounded"]),
    ):  # fmt: skip
        for chunk_size, kept in ((None, True), (20, False)):
            kernels.searches.clear()
            problem = build_problem(*case.args)
            with own_precision(problem):
                engine.run(problem, TritonBackend("few_classes"), chunk_size)
            one, two = kernels.searches
            assert one.key == f"few_classes_first,{key}"
            assert two.key == f"few_classes_second,{key},{kept}"
            assert (named(one.candidates), named(two.candidates)) == (first, second)
            assert one.default.tile.name in first and two.default.tile.name in second
            for search in (one, two):
                name = search.key.partition(",")[0]
                assert kernels.of(name)[-1].choice is search.default
                search.launch("another tile")
                call = kernels.of(name)[-1]
                assert (call.choice, call.precision) == ("another tile", problem.precision)
    monkeypatch.setattr(few_classes, "_version", lambda: (3, 9))
    found = searches(kernels, "few_classes", job_of(8, 12))["few_classes_first"]
    assert named(found.candidates) == ["fits", "wider", "later"]


def test_limits_are_those_of_the_device(kernels, monkeypatch) -> None:
    """A GPU with less memory a block gets what fits there."""
    from moso_fast.kernels import gradient_sum

    own = {"rounded": False, "aligned": True, "narrow": False}
    monkeypatch.setattr(gradient_sum, "TILES", (choice("wanted", 100, **own),
                                                choice("small", 50, **own)))  # fmt: skip
    asked = []
    for size, names in ((100, ["wanted", "small"]), (99, ["small"]), (10, [])):
        limits = Limits(size, (9, 0))
        monkeypatch.setattr(products, "limits_of", lambda d, of=limits: asked.append(d) or of)
        search = searches(kernels, "stored", job_of(8, 12))["gradient_sum"]
        assert named(search.candidates) == names
        assert search.default.name == (names or ["wanted"])[0]
    assert set(asked) == {torch.device("cpu")}


def test_gpus_get_tiles_of_their_generation(kernels, machine, monkeypatch) -> None:
    """Also where it is new: the first of a table that this GPU can take."""
    from moso_fast.kernels import row_tiles, stacked_alignment, stored_alignment

    own: dict[str, Any] = {"rounded": False, "aligned": True, "products": "tf32x3"}
    newest = choice("newest", majors=(10,), losses=("ids",), **own)
    table = (newest, choice("any", losses=("ids",), **own))
    for module in (row_tiles, stacked_alignment):
        monkeypatch.setattr(module, "TILES", table)
    for name in ("PROJECT_TILES", "PULL_TILES"):
        monkeypatch.setattr(stored_alignment, name, table)
    for capability, names in (((10, 3), ["newest", "any"]), ((9, 0), ["any"]), ((12, 0), ["any"])):
        machine(interpret=True, capability=capability)
        for regime, kernel in (("stored", "stored_alignment"), ("row_tiles", "row_tiles"),
                               ("recompute", "stacked_alignment")):  # fmt: skip
            search = searches(kernels, regime, job_of(8, 12))[kernel]
            assert (named(search.candidates), search.default.name) == (names, names[0]), kernel
