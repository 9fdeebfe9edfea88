"""What whole-network scoring checks, says and refuses, piece by piece; and how it cuts batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from full_rules import batch_of, network_of
from torch import Tensor, nn

from moso_fast.full import chunks, scope
from moso_fast.full.checks import FirstSample, SelfCheckError, check_model, check_sum
from moso_fast.full.chunks import Chunks, out_of_memory
from moso_fast.full.repeat import can_repeat, cannot_repeat, failed_again
from moso_fast.full.rows import tolerance

CPU = torch.device("cpu")


def test_layers_by_which_samples_influence_each_other() -> None:
    check_model(nn.Sequential(nn.BatchNorm2d(3), nn.Embedding(4, 2), nn.InstanceNorm2d(3)))
    for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        with pytest.raises(ValueError) as caught:
            check_model(nn.Sequential(nn.ReLU(), norm(3, track_running_stats=False)))
        assert str(caught.value) == (
            "model: batch norm '1' uses the statistics of the batch, so that samples influence "
            "each other; it needs running statistics (track_running_stats=True)"
        )
    for kind in (nn.Embedding, nn.EmbeddingBag):
        model = nn.Sequential(kind(4, 2, scale_grad_by_freq=True))
        with pytest.raises(ValueError) as caught:
            check_model(model)
        assert str(caught.value) == (
            "model: embedding '0' divides gradients by how often a token is in the batch, so that "
            "samples influence each other; set scale_grad_by_freq=False"
        )
        model[0].weight.requires_grad_(False)
        check_model(model)


@pytest.mark.parametrize(
    ("dtype", "rough", "allowed"),
    [
        (torch.float64, False, 1e-6),
        (torch.float32, False, 1e-4),
        (torch.bfloat16, False, 5e-2),
        (torch.float64, True, 5e-2),
    ],
)
def test_alignments_sum_to_the_mean_gradient(
    dtype: torch.dtype, rough: bool, allowed: float
) -> None:
    """To a share of |G| sum_i |g_i|: here 2 * (1 + 2 + 3), and N |G|^2 = 12."""
    norms = torch.tensor([1.0, 4.0, 9.0, torch.nan], dtype=torch.float64)
    for share in (-1.01, -0.99, 0.0, 0.99, 1.01):
        total = 12.0 + share * allowed * 12.0
        alignment = torch.tensor([0.0, total - 5.0, 5.0, torch.nan], dtype=torch.float64)
        fields = {"alignment": alignment, "grad_sqnorm": norms}
        if abs(share) < 1:
            check_sum(fields, 3, 4.0, dtype, rough)
            continue
        with pytest.raises(SelfCheckError) as caught:
            check_sum(fields, 3, 4.0, dtype, rough)
        assert str(caught.value) == (
            f"self-check failed: the alignments sum to {total:.9g} but N |G|^2 is 12 (allowed "
            f"difference {12 * allowed:.3g})"
        )
    zeros = {"alignment": torch.zeros(2), "grad_sqnorm": torch.zeros(2)}
    check_sum(zeros, 2, 0.0, dtype, rough)
    broken = {"alignment": torch.tensor([torch.inf]), "grad_sqnorm": torch.ones(1)}
    with pytest.raises(SelfCheckError):
        check_sum(broken, 1, 1.0, dtype, rough)


def test_the_first_sample_that_counts_is_checked() -> None:
    """Its gradient is (2 z x), by hand, with z = 2 x."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(2.0)
    network, x = network_of(model), torch.tensor([[9.0], [3.0], [1.0]]).double()
    batch, key = batch_of(x), id(model.weight)
    gradient, nan = 2 * (2 * 3.0) * 3.0, float("nan")
    for factor, fails in ((1 + 0.9e-3, False), (1 - 0.9e-3, False), (1.1, True), (0.9, True)):
        norms = torch.tensor([nan, factor * gradient**2, 5.0]).double()
        first = FirstSample()
        if fails:
            with pytest.raises(SelfCheckError) as caught:
                first.take(network, batch, norms, 1e-3)
            assert str(caught.value) == (
                f"self-check failed: |g|^2 of sample 21 is {float(norms[1]):.9g}, by plain "
                f"autograd {gradient**2:.9g}"
            )
            continue
        first.take(network, batch, torch.full((3,), nan), 1e-3)
        assert first.gradient is None and first.number == -1
        first.take(network, batch, norms, 1e-3)
        assert first.number == 21 and first.gradient is not None
        assert first.gradient[key].item() == pytest.approx(gradient)
        first.take(network, batch, torch.zeros(3), 1e-3)  # one sample is enough
        mean = {key: torch.tensor([[-2.0]]).double()}
        index = torch.tensor([20, 21, 22])
        product, bound = -2.0 * gradient, 1e-3 * 2 * gradient
        for share in (-1.1, -0.9, 0.9, 1.1):
            alignment = torch.tensor([0.0, product + share * bound, 0.0]).double()
            if abs(share) < 1:
                first.check_alignment(mean, alignment, index, 1e-3)
                continue
            with pytest.raises(SelfCheckError) as caught:
                first.check_alignment(mean, alignment, index, 1e-3)
            assert str(caught.value) == (
                f"self-check failed: the alignment of sample 21 is {float(alignment[1]):.9g}, by "
                f"plain autograd {product:.9g}"
            )
    FirstSample().check_alignment({}, torch.zeros(1), torch.zeros(1), 1e-3)


def test_allowed_difference_of_two_ways() -> None:
    for dtype, allowed in ((torch.float64, 1e-6), (torch.float32, 2e-3), (torch.bfloat16, 0.1)):
        network = network_of(nn.Linear(2, 2).to(dtype))
        assert tolerance(network) == allowed
        assert can_repeat(network) is (dtype != torch.float64)
        network.autocast = torch.bfloat16
        assert tolerance(network) == 0.1 and can_repeat(network)


def test_errors_after_a_repetition_in_float64() -> None:
    error = SelfCheckError("self-check failed: x")
    assert str(failed_again(error)) == (
        "self-check failed: x; that is with dtype=torch.float64, so it is not rounding: please "
        "report this with the model"
    )
    for reason, said in (
        (TypeError("  no float64 \n more"), "TypeError: no float64 "),
        (RuntimeError("y" * 200), "RuntimeError: " + "y" * 160),
        (MemoryError(), "MemoryError: "),
    ):
        assert str(cannot_repeat(error, reason)) == (
            "self-check failed: x; dtype=torch.float64 would tell whether this is rounding, but "
            f"the model does not run in it ({said})"
        )
    assert isinstance(failed_again(error), SelfCheckError)


def test_errors_that_mean_that_memory_ran_out() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("CUDA Out Of Memory: tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError("x"))


def cut(sizer: Chunks, samples: int, work: Any) -> Iterator[tuple[Any, Any, Any]]:
    return sizer.of(batch_of(torch.arange(samples)[:, None]), work)


def test_batches_are_cut() -> None:
    def work(chunk: Any) -> tuple[Tensor, str]:
        return chunk.args[0], "done"

    for size, sizes in ((None, [7]), (3, [3, 3, 1]), (9, [7]), (1, [1] * 7)):
        found = list(cut(Chunks(CPU, size), 7, work))
        assert [chunk.samples for chunk, *_ in found] == sizes
        assert torch.equal(torch.cat([x for _, x, _ in found]), torch.arange(7)[:, None])
        assert {said for *_, said in found} == {"done"}


def test_chunks_that_do_not_fit_are_halved() -> None:
    tried: list[int] = []

    def fits(most: int, error: Exception) -> Any:
        tried.clear()

        def work(chunk: Any) -> tuple[int, int]:
            tried.append(chunk.samples)
            if chunk.samples > most:
                raise error
            return 0, 0

        return work

    for error in (MemoryError(), RuntimeError("out of memory")):
        sizer = Chunks(CPU)
        found = [chunk.samples for chunk, *_ in cut(sizer, 9, fits(2, error))]
        assert found == [2, 2, 2, 2, 1]
        assert tried == [9, 5, 3, 2, 2, 2, 2, 1] and sizer.size == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        list(cut(Chunks(CPU), 3, fits(0, RuntimeError("out of memory"))))
    assert tried == [3, 2, 1]  # one sample cannot be halved
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(cut(Chunks(CPU), 3, fits(1, RuntimeError("shapes differ"))))
    assert tried == [3]


def test_chunks_for_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of it holds four times what the model keeps of the samples."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert Chunks(CPU)._budget() == memory / 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    assert Chunks(torch.device("cuda"))._budget() == 300
    for one, size in ((memory / 16 / 3, 3), (memory / 16 / 3.9, 3), (memory, 1)):
        sizer = Chunks(CPU)
        sizer.choose(int(one))
        assert sizer.size == size
        sizer.choose(1)
        assert sizer.size == size  # chosen once
    for sizer, size in ((Chunks(CPU, 5), 5), (Chunks(CPU), None)):
        sizer.choose(0 if size is None else memory)
        assert sizer.size == size
    monkeypatch.setattr(chunks.os, "sysconf_names", {})
    assert Chunks(CPU)._budget() == 2**31


def test_the_chunk_at_hand_begins_again_where_it_is_too_large() -> None:
    sizer, tried = Chunks(CPU), []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def work(chunk: Any) -> tuple[int, int]:
        tried.append(chunk.samples)
        sizer.choose(memory // 16 // 2)
        return 0, 0

    assert [chunk.samples for chunk, *_ in cut(sizer, 5, work)] == [2, 2, 1]
    assert tried == [5, 2, 2, 1]


def parts() -> nn.Module:
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "fc": nn.Linear(2, 1)}
    )
    model["body"][0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, ["body.0.weight", "body.1.weight", "body.1.bias", "fc.weight", "fc.bias"]),
        ("fc", ["fc.weight", "fc.bias"]),
        ("fc.bias", ["fc.bias"]),
        ("body", ["body.0.weight", "body.1.weight", "body.1.bias"]),
        (["fc", "body.0"], ["body.0.weight", "fc.weight", "fc.bias"]),
        (("*.bias",), ["body.1.bias", "fc.bias"]),
        ({"body.?.weight"}, ["body.0.weight", "body.1.weight"]),
        (lambda name, p: p.numel() == 2, ["body.1.bias", "fc.weight"]),
    ],
)
def test_scopes(chosen: Any, names: list[str]) -> None:
    """In the model's order; a frozen parameter is in none."""
    model = parts()
    found = scope.choose_parameters(model, chosen)
    assert list(found) == names
    assert all(p is dict(model.named_parameters())[name] for name, p in found.items())


def test_scopes_that_are_none() -> None:
    model = parts()
    first = "body.0.weight, body.1.weight, body.1.bias, fc.weight"
    for chosen, error, said in (
        (
            "FC",
            ValueError,
            f"scope 'FC' matches no parameter that requires grad; the first are {first}",
        ),
        (
            "body.0.bias",
            ValueError,
            f"scope 'body.0.bias' matches no parameter that requires grad; the first are {first}",
        ),
        (
            "bod",
            ValueError,
            f"scope 'bod' matches no parameter that requires grad; the first are {first}",
        ),
        (["fc", 3], TypeError, "scope must hold names, got int"),
        (3, TypeError, "scope must be None, names or a predicate (name, parameter), got int"),
        ([], ValueError, "model: no parameter is in scope, so there is no gradient to score"),
    ):
        with pytest.raises(error) as caught:
            scope.choose_parameters(model, chosen)
        assert str(caught.value) == said
    model.requires_grad_(False)
    with pytest.raises(ValueError) as caught:
        scope.choose_parameters(model)
    assert str(caught.value) == (
        "model: no parameter requires grad, so there is no gradient to score"
    )
    with pytest.raises(ValueError, match=r"the first are none$"):
        scope.choose_parameters(model, "fc")


def test_gradients_for_some_parameters_alone() -> None:
    model = parts()
    before = [p.requires_grad for p in model.parameters()]
    frozen = model["body"][0].bias
    with scope.only_these_require_grad(model, [model["fc"].bias, frozen]):
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names == ["body.0.bias", "fc.bias"]
    assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(KeyError), scope.only_these_require_grad(model, []):
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before
