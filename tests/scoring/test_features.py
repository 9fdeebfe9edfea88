"""The features that a hook on the head collects, and the model while it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feature_cases import ITEMS, Items, Stream, TinyForCausalLM, Y, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moso_fast.scoring.eval_mode import evaluating
from moso_fast.scoring.features import FeatureCapture
from moso_fast.sources.data.batches import make_loader
from moso_fast.sources.find_head import find_head


def test_modes_come_back_exactly_also_after_an_interrupt() -> None:
    model = net(a=nn.Linear(2, 2), bn=nn.BatchNorm1d(2), drop=nn.Dropout(), fc=nn.Linear(2, 2))
    for error in (KeyboardInterrupt, ValueError, None):
        model.train()
        model.bn.eval()
        model.drop.eval()
        modes = [module.training for module in model.modules()]
        try:
            with evaluating(model):
                assert not any(module.training for module in model.modules())
                assert not torch.is_grad_enabled()
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ValueError):
            pass
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()


def capture(model: nn.Module, data: Any, head: str | None = None, **options: Any) -> FeatureCapture:
    name, module = find_head(model, head)
    return FeatureCapture(model, name, module, make_loader(data, 4), **options)


def test_features_are_the_inputs_of_the_head() -> None:
    torch.manual_seed(0)
    model = net(a=nn.Linear(3, 4), bn=nn.BatchNorm1d(4), relu=nn.ReLU(), fc=nn.Linear(4, 2))
    inputs = torch.randn(11, 3)
    collected = capture(model, TensorDataset(inputs, torch.arange(11) % 2)).run()
    assert model.training and not model.fc._forward_pre_hooks
    model.eval()
    expected = model.relu(model.bn(model.a(inputs))).detach()
    torch.testing.assert_close(collected.features, expected, rtol=0, atol=1e-6)
    assert torch.equal(collected.labels, torch.arange(11) % 2)
    assert collected.cu_seqlens is None
    assert collected.features.dtype == torch.float32
    assert not collected.features.requires_grad


def test_batch_norm_statistics_are_not_updated() -> None:
    model = net(bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 2))
    before = model.bn.running_mean.clone()
    capture(model, Items()).run()
    assert torch.equal(model.bn.running_mean, before)
    assert int(model.bn.num_batches_tracked) == 0


def test_input_is_copied_before_the_model_changes_it() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.fc(x)
            x.zero_()
            return logits

    collected = capture(InPlace(), Items()).run()
    assert torch.equal(collected.features[:, 0], torch.arange(6.0))


@pytest.mark.parametrize(
    ("dtype", "cache", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float64, "auto", torch.float64),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_cache_dtype(dtype: torch.dtype, cache: str, expected: torch.dtype) -> None:
    model = net(fc=nn.Linear(3, 2)).to(dtype)
    collected = capture(model, Items(), cache=cache, dtype=dtype).run()
    assert collected.features.dtype == expected
    assert torch.equal(collected.features[:, 0].float(), torch.arange(6.0))


def test_cache_is_allocated_once_and_used_again() -> None:
    runner = capture(net(fc=nn.Linear(3, 2)), Items())
    first = runner.run().features
    assert runner.run().features.data_ptr() == first.data_ptr()
    assert runner.passes == 2
    assert len(first) == 6


def test_stream_of_unknown_length() -> None:
    collected = capture(net(fc=nn.Linear(3, 2)), Stream()).run()
    assert torch.equal(collected.features[:, 0], torch.arange(6.0))


def test_stream_that_shuffles_is_found_by_its_labels() -> None:
    """The stream begins with other samples when it is read again, after the first pass already."""
    runner = capture(net(fc=nn.Linear(3, 2)), Stream(shuffle=True))
    with pytest.raises(ValueError, match="the stream begins with other samples when it is read"):
        runner.run()


def sequences(lengths: list[int], length: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    items = []
    for n in lengths:
        ids = torch.randint(1, 7, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < n, ids, -100)
        items.append({"input_ids": ids, "attention_mask": (labels >= 0).long(), "labels": labels})
    return items


@pytest.mark.parametrize("shift", [False, True])
def test_token_features_keep_counted_tokens_of_each_sequence(shift: bool) -> None:
    torch.manual_seed(0)
    model = TinyForCausalLM().eval()
    items = sequences([5, 2, 0, 3, 4])
    collected = capture(model, items, shift=shift).run()
    rows, labels, sizes = [], [], []
    for item in items:
        hidden = torch.tanh(model.mix(model.embed(item["input_ids"]))).detach()
        target = item["labels"]
        if shift:
            hidden, target = hidden[:-1], target[1:]
        keep = target != -100
        if not keep.any():
            keep[0] = True
        rows.append(hidden[keep])
        labels.append(target[keep])
        sizes.append(int(keep.sum()))
    torch.testing.assert_close(collected.features, torch.cat(rows), rtol=0, atol=1e-6)
    assert torch.equal(collected.labels, torch.cat(labels))
    assert collected.cu_seqlens is not None
    assert collected.cu_seqlens.diff().tolist() == sizes
    assert collected.samples == 5
    assert collected.counted(-100).tolist() == [True, True, False, True, True]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 2)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc(2 * x)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[1:])


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=x)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(1, 1, *x.shape))


class Image(nn.Module):
    """A head on (B, T, D) tokens of samples that have one label each."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, None].expand(-1, 2, -1))


def test_head_called_by_keyword() -> None:
    assert torch.equal(capture(ByKeyword(), Items()).run().features[:, 0], torch.arange(6.0))


@pytest.mark.parametrize(
    ("model", "head", "data", "options", "message"),
    [
        (
            Twice(),
            None,
            ITEMS,
            {},
            "head 'fc' was called more than once in one forward pass; its gradient is then no "
            "product of one input and one residual",
        ),
        (
            Twice(),
            "unused",
            ITEMS,
            {},
            "head 'unused' was not called in the forward pass of the model; choose the last "
            "layer with head=",
        ),
        (
            Dropping(),
            None,
            ITEMS,
            {},
            "head 'fc' got features (3, 3) for labels (4,); it must see one row per label",
        ),
        (
            Wide(),
            None,
            ITEMS,
            {},
            "head 'fc' must get (N, D) or (B, T, D) features, got (1, 1, 4, 3)",
        ),
        (
            Image(),
            None,
            ITEMS,
            {},
            "head 'fc' got token features (4, 2, 3), so labels must have shape (4, 2), got (4,)",
        ),
        (
            TinyForCausalLM(),
            None,
            sequences([1, 1], length=1),
            {"shift": True},
            "head 'lm_head' got sequences of 1 token(s), which leaves nothing to predict",
        ),
        (
            net(fc=nn.Linear(3, 2)),
            None,
            DataLoader(ITEMS, batch_size=4, collate_fn=lambda b: (torch.ones(1, 3), Y[:1])),
            {},
            "data: the loader yields 2 samples of a data set of 6; every sample must come once",
        ),
    ],
)
def test_forward_passes_that_are_refused(
    model: nn.Module, head: str | None, data: Any, options: dict, message: str
) -> None:
    runner = capture(model, data, head, **options)
    with pytest.raises(ValueError) as caught:
        runner.run()
    assert str(caught.value) == message
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_compiled_model_runs_with_its_hook() -> None:
    model = net(a=nn.Linear(3, 3), fc=nn.Linear(3, 2))
    compiled = torch.compile(model, backend="eager")
    with evaluating(model):
        compiled(torch.ones(4, 3))
        compiled(torch.ones(2, 3))
    name, head = find_head(compiled)
    assert (name, head) == ("_orig_mod.fc", model.fc)
    collected = FeatureCapture(compiled, name, head, make_loader(ITEMS, 4)).run()
    expected = model.a(torch.arange(6.0)[:, None].expand(-1, 3))
    torch.testing.assert_close(collected.features, expected)


class Squeezes(nn.Module):
    """Takes a batch of one sample for a sample without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.body(x))[:, :, None].squeeze())


@pytest.mark.parametrize("named", [False, True])
def test_a_last_batch_of_one_goes_through_as_one_of_two(named: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    data: Any = TensorDataset(x, y)
    if named:
        data = [{"x": one, "labels": label} for one, label in zip(x, y, strict=True)]
    model = Squeezes()
    found = FeatureCapture(model, "fc", model.fc, DataLoader(data, batch_size=4)).run()
    torch.testing.assert_close(found.features, torch.tanh(model.body(x)).detach())
    assert found.labels.tolist() == y.tolist()


def test_batches_of_one_alone_say_what_is_wrong() -> None:
    data = TensorDataset(torch.randn(3, 5), torch.arange(3))
    model = Squeezes()
    with pytest.raises(ValueError, match=r"the model returned a tensor \(3,\)"):
        FeatureCapture(model, "fc", model.fc, DataLoader(data, batch_size=1)).run()
