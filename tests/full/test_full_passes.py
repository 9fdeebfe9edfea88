"""What surrounds the passes of a network, what they see of a model, and rows that go in pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_rules import CLOSE, ROWS, batch_of, network_of, squares
from torch import Tensor, nn

from moso_fast.full import modes
from moso_fast.full.methods import Methods
from moso_fast.full.modes import Sound
from moso_fast.full.norms import checkpointing, recurrent, trace
from moso_fast.full.norms.normalization import _as_autocast_does, with_strides_of
from moso_fast.full.norms.tape import Plan, Tape
from moso_fast.full.norms.trace import Trace, leaves, untraced_uses
from moso_fast.full.passes import dense, new_trace, traced

CPU = torch.device("cpu")


def settings() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def test_surroundings_of_a_pass() -> None:
    """No gradient checkpointing, no fused attention; autocast without its cache where asked for."""
    before = settings()
    for dtype in (None, torch.bfloat16, torch.float16):
        network = network_of(nn.Linear(4, 3), autocast=dtype)
        assert network.autocast == dtype
        for plain in (False, True):
            with network.context(plain):
                on, cached, fast, flash, efficient, math = settings()
                assert (on, cached) == ((True, False) if dtype else before[:2])
                assert not dtype or torch.get_autocast_dtype("cpu") == dtype
                assert fast is False and math is True
                assert (flash, efficient) == ((False, False) if plain else before[3:5])
                hook = torch.utils.checkpoint._checkpoint_hook
                assert hook.__enter__ is checkpointing._stays
            assert settings() == before
    with torch.autocast("cpu", torch.bfloat16):
        assert network_of(nn.Linear(4, 3)).autocast == torch.bfloat16
        assert network_of(nn.Linear(4, 3), autocast=torch.float16).autocast == torch.float16


@pytest.mark.parametrize("fast", [True, False])
def test_the_fused_path_of_attention_is_as_it_was(fast: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with pytest.raises(KeyError), checkpointing.whole_graph():
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_means_over_the_views_of_a_sample() -> None:
    network, rows = network_of(nn.Linear(4, 3)), torch.arange(6.0)
    assert network.per_sample(rows, batch_of(rows[:, None])) is rows
    found = network.per_sample(rows, batch_of(rows[:, None], views=2))
    assert found.tolist() == [0.5, 2.5, 4.5]


def test_a_row_that_is_alone_goes_through_in_a_pair() -> None:
    seen = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    model = Looks(4, 3).double()
    network, x = network_of(model), torch.randn(2, 4, dtype=torch.float64)
    for pairs, one in ((None, 1), (False, 1), (True, 2)):
        network.pairs = pairs
        for rows, given in ((1, one), (2, 2)):
            seen.clear()
            batch = batch_of(x[:rows])
            losses = network.losses(network.forward(batch), batch)
            assert seen == [given] and network.enough(batch).rows == given
            expected = squares(F.linear(x, model.weight, model.bias), x)[:rows]
            torch.testing.assert_close(losses.loss, expected.detach())
            assert len(losses.counted) == rows
            tape = new_trace(network, Plan({}), batch, True)[1]
            assert (tape.rows, tape.samples) == (given, given)


def test_what_a_pass_leaves_out() -> None:
    """Nothing to differentiate; a gradient that is stored sparsely."""
    model = nn.Embedding(5, 3, sparse=True).double()
    batch = batch_of(torch.randint(5, (ROWS, 2)))
    network = network_of(model, lambda z, y: z.detach().flatten(1).sum(1))
    losses, sums, tape = traced(network, Methods(network).plan, batch_of(batch.args[0][:1]))
    assert sums == [None] and tape.norms == {} and len(losses.loss) == 1
    g = torch.autograd.grad(model(batch.args[0]).sum(), model.weight)[0]
    assert g.layout == torch.sparse_coo and dense(g).layout == torch.strided
    assert torch.equal(dense(g), g.to_dense())
    same = torch.ones(3)
    assert dense(same) is same


def test_leaves_and_untraced_uses_of_a_graph() -> None:
    p, q, other = (torch.randn(3, requires_grad=True) for _ in range(3))
    names = {id(p): "p", id(q): "q"}
    output = (p * q).sum() + (other * 2).sin().sum() + q.sum()
    assert untraced_uses(output, names) == {id(p), id(q)}
    assert leaves(output, {id(p), id(q)})[0] is other and len(leaves(output, set())) == 3
    assert leaves(output, {id(v) for v in (p, q, other)}) == []
    plan = Plan({id(p): "p"})
    with Trace(Tape(plan, 1, 1, CPU)):
        product = torch.randn(1, 3) * p
    assert untraced_uses(product.sum(), names) == set()
    assert untraced_uses(product.sum() + p.sum(), names) == {id(p)}


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_a_gpu_are_written_out(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced or not: cuDNN's have no backward in eval mode. On a CPU those not traced stay."""
    calls: list[str] = []

    def watched(linear: Any, kind: str, *args: Any) -> Any:
        calls.append(kind)
        return recurrent.recurrent(linear, kind, *args)

    monkeypatch.setattr(modes, "recurrent", watched)
    monkeypatch.setattr(trace, "recurrent", watched)
    layer, x = kind(4, 3).double(), torch.randn(2, ROWS, 4, dtype=torch.float64)
    names = {id(p): name for name, p in layer.named_parameters()}
    expected = layer(x)[0]
    name = kind.__name__.lower()
    surroundings: list[tuple[Callable[[], Any], list[str]]] = [
        (Sound, []),
        (lambda: Trace(Tape(Plan({}), ROWS, ROWS, CPU)), []),
        (lambda: Trace(Tape(Plan(names), ROWS, ROWS, CPU, probing=True)), [name]),
    ]
    for surrounding, on_cpu in surroundings:
        for given, found in ((x, on_cpu), (x.as_subclass(OnGpu), [name])):
            calls.clear()
            with surrounding():
                outputs = layer(given)[0]
            torch.testing.assert_close(outputs.as_subclass(Tensor), expected, **CLOSE)
            assert calls == found
            with surrounding():
                assert (given * 2).shape == x.shape
            assert calls == found


@pytest.mark.parametrize("surrounding", [Sound, None])
def test_gradients_of_a_batch_norm_have_the_strides_of_its_input(surrounding: Any) -> None:
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    layer = nn.BatchNorm2d(4).eval()
    seen = []
    if surrounding is None:
        result = with_strides_of(x, layer(x))
    else:
        with surrounding():
            result = layer(x)
    result.register_hook(lambda g: seen.append(g))
    permuted = torch.randn(1, 9, 4).transpose(1, 2).unflatten(2, (3, 3))
    assert permuted.stride() != x.stride()
    result.backward(permuted)
    assert seen[0].stride() == x.stride() and torch.equal(seen[0], permuted)
    wide = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(wide).backward(permuted.expand(2, -1, -1, -1))
    torch.testing.assert_close(x.grad[0], wide.grad[0])
    plain = torch.zeros(1)
    assert with_strides_of(x, plain) is plain


def test_what_autocast_widens() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.zeros(2, dtype=dtype)
        assert _as_autocast_does(x) is x
        with torch.autocast("cpu", torch.bfloat16):
            found = _as_autocast_does(x)
        wide = dtype in (torch.float32, torch.float64)
        assert found is x if wide else found.dtype == torch.float32


def test_batch_norms_that_use_the_batch_are_refused() -> None:
    plan, x = Plan({}), torch.randn(3, 4)
    mean, var = torch.zeros(4), torch.ones(4)
    with Trace(Tape(plan, 3, 3, CPU)):
        F.batch_norm(x, mean, var, training=False)
        for args, training in (((mean, var), True), ((None, None), False), ((mean, None), False)):
            with pytest.raises(ValueError) as caught:
                F.batch_norm(x, *args, training=training)
            assert str(caught.value) == (
                "model: a batch norm uses the statistics of the batch, so that samples influence "
                "each other; it needs running statistics (track_running_stats=True) and eval mode"
            )


def test_batch_norms_that_are_not_traced_keep_their_options() -> None:
    x, mean, var = torch.randn(3, 4), torch.randn(4), torch.rand(4)
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4)
    for options in ({}, {"eps": 0.5}, {"weight": weight}, {"weight": weight, "bias": bias}):
        expected = F.batch_norm(x, mean, var, **options)
        with Trace(Tape(Plan({}), 3, 3, CPU)):
            assert torch.equal(F.batch_norm(x, mean, var, **options), expected)
