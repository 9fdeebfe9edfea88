"""Head discovery, data-set order, and the features that a hook on the head collects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from moso_fast.scoring.eval_mode import evaluating
from moso_fast.scoring.features import FeatureCapture
from moso_fast.sources.data.batches import make_loader, sample_count, split_batch
from moso_fast.sources.find_head import find_head, predicts_next_token


def net(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


class Timm(nn.Module):
    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.head = classifier
        self.norm = nn.LayerNorm(3)

    def get_classifier(self) -> Any:
        return self.head


class LanguageModel(nn.Module):
    """Shaped like a causal model of transformers: the head is registered first."""

    def __init__(self, vocabulary: int = 7, width: int = 5) -> None:
        super().__init__()
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict:
        return {"logits": self.lm_head(torch.tanh(self.mix(self.embed(input_ids))))}


class TinyForCausalLM(LanguageModel):
    pass


class NoEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 2)

    def get_output_embeddings(self) -> None:
        raise NotImplementedError


def test_last_linear_is_the_head() -> None:
    model = net(conv=nn.Conv2d(1, 2, 3), flat=nn.Flatten(), fc=nn.Linear(2, 4), drop=nn.Dropout())
    assert find_head(model) == ("fc", model.fc)
    assert find_head(nn.Linear(3, 2))[0] == ""
    assert find_head(nn.DataParallel(model)) == ("module.fc", model.fc)


def test_the_model_is_asked_first() -> None:
    timm = Timm(nn.Linear(3, 2))
    assert find_head(timm) == ("head", timm.head)
    language = LanguageModel()
    assert find_head(language) == ("lm_head", language.lm_head)
    assert find_head(NoEmbeddings())[0] == "classifier"


def test_head_by_name_and_module() -> None:
    model = net(a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    assert find_head(model, "a") == ("a", model.a)
    assert find_head(model, model.a) == ("a", model.a)


LAST_IS_NORM = net(a=nn.Linear(3, 3), b=nn.Linear(3, 2), norm=nn.LayerNorm(2))


@pytest.mark.parametrize(
    ("model", "head", "error", "message"),
    [
        (
            LAST_IS_NORM,
            None,
            ValueError,
            "head cannot be found: the last module with parameters is 'norm' (LayerNorm); choose "
            "one with head=; its nn.Linear modules are 'a' (3 -> 3), 'b' (3 -> 2)",
        ),
        (
            net(conv=nn.Conv2d(1, 1, 3)),
            None,
            ValueError,
            "head cannot be found: the last module with parameters is 'conv' (Conv2d); choose one "
            "with head=; the model has no nn.Linear",
        ),
        (
            net(flat=nn.Flatten()),
            None,
            ValueError,
            "head cannot be found: no module has parameters; choose one with head=; "
            "the model has no nn.Linear",
        ),
        (
            Timm(nn.Conv2d(3, 2, 3)),
            None,
            TypeError,
            "head found by get_classifier() 'head' must be an nn.Linear, got Conv2d",
        ),
        (
            Timm(nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])),
            None,
            TypeError,
            "head found by get_classifier() 'head' must be an nn.Linear, got ModuleList",
        ),
        (
            LAST_IS_NORM,
            "c",
            ValueError,
            "head 'c' is no module of the model; its nn.Linear modules are 'a' (3 -> 3), "
            "'b' (3 -> 2)",
        ),
        (LAST_IS_NORM, "norm", TypeError, "head 'norm' must be an nn.Linear, got LayerNorm"),
        (LAST_IS_NORM, nn.Linear(1, 1), ValueError, "head (Linear) is no module of the model"),
        (LAST_IS_NORM, 3, TypeError, "head must be a name, a module or None, got int"),
    ],
)
def test_heads_that_are_refused(model: nn.Module, head: Any, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        find_head(model, head)
    assert str(caught.value) == message


def test_two_classifiers_are_ambiguous() -> None:
    model = net(head=nn.Linear(3, 2), head_dist=nn.Linear(3, 2))
    model.get_classifier = lambda: (model.head, model.head_dist)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"get_classifier\(\) gives 2 modules.*'head_dist'"):
        find_head(model)


def test_causal_models_by_name() -> None:
    assert predicts_next_token(TinyForCausalLM())
    assert not predicts_next_token(LanguageModel())


class Items(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3,), float(index)), index


class Stream(IterableDataset):
    def __init__(self, shuffle: bool = False) -> None:
        self.shuffle, self.passes = shuffle, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        self.passes += 1
        order = reversed(range(6)) if self.shuffle and self.passes > 1 else range(6)
        return ((torch.full((3,), float(i)), i % 2) for i in order)


ITEMS = Items()
WRONG_ORDER = "data: scores come back in data-set order, but the loader may shuffle"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(ITEMS, shuffle=True), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=RandomSampler(ITEMS)), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=SubsetRandomSampler(range(6))), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=WeightedRandomSampler([1.0] * 6, 6)), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=[0, 2, 1, 3, 4, 5]), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=range(5)), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=SequentialSampler(range(5))), WRONG_ORDER),
        (
            lambda: DataLoader(ITEMS, batch_sampler=BatchSampler(RandomSampler(ITEMS), 2, False)),
            WRONG_ORDER,
        ),
        (
            lambda: DataLoader(
                ITEMS, sampler=BatchSampler(RandomSampler(ITEMS), 2, False), batch_size=None
            ),
            WRONG_ORDER,
        ),
        (lambda: DataLoader(ITEMS, batch_sampler=[[0, 1], [3, 2], [4, 5]]), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, batch_sampler=[[0, 1], [2, 3]]), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, batch_size=4, drop_last=True), "data: the loader has drop_last"),
        (
            lambda: DataLoader(
                ITEMS, batch_sampler=BatchSampler(SequentialSampler(ITEMS), 4, drop_last=True)
            ),
            "data: the loader has drop_last",
        ),
        (lambda: DataLoader(Stream(), batch_size=4, drop_last=True), "data: the loader has drop"),
        (lambda: Subset(ITEMS, []), "data holds no samples"),
        (lambda: DataLoader(Subset(ITEMS, [])), "data holds no samples"),
    ],
)
def test_loaders_out_of_order_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_loader(make(), 4)


@pytest.mark.parametrize("data", [3, "abc", {"a": 1}, torch.ones(3), iter([1])])
def test_what_is_no_data_set(data: Any) -> None:
    with pytest.raises(TypeError, match="data must be a DataLoader or a Dataset, got "):
        make_loader(data, 4)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (ITEMS, 6),
        (Subset(ITEMS, [5, 1]), 2),
        ([(torch.ones(3), 1)] * 5, 5),
        (TensorDataset(torch.ones(7, 3), torch.ones(7)), 7),
        (DataLoader(ITEMS, generator=torch.Generator()), 6),
        (DataLoader(ITEMS, sampler=range(6)), 6),
        # Each item is a batch: how many samples it holds shows when it is read.
        (DataLoader([(torch.ones(2, 3), torch.ones(2))] * 3, batch_size=None), None),
        (DataLoader(ITEMS, sampler=BatchSampler(range(6), 4, False), batch_size=None), 6),
        (DataLoader(ITEMS, batch_sampler=[[0, 1], [2, 3], [4, 5]]), 6),
        (Stream(), None),
    ],
)
def test_loaders_in_order(data: Any, count: int | None) -> None:
    assert sample_count(make_loader(data, 4)) == count


def test_tensor_data_set_is_sliced_by_whole_batches() -> None:
    inputs = torch.arange(14.0).reshape(7, 2)
    batches = list(make_loader(TensorDataset(inputs, torch.arange(7)), 3))
    assert [len(x) for x, _ in batches] == [3, 2, 2], "no batch of one"
    assert torch.equal(torch.cat([x for x, _ in batches]), inputs)


X, Y = torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        ((X, Y), (X,), {}),
        ([X, [0, 1]], (X,), {}),
        (((X, 3), Y), (X, 3), {}),
        (({"a": X}, Y), (), {"a": X}),
        ({"labels": Y, "x": X}, (), {"x": X}),
        ({"label": Y, "x": X}, (), {"x": X}),
        ((X, Y, torch.tensor([4, 9])), (X,), {}),
        ((torch.tensor([4, 9]), (X, Y)), (X,), {}),
    ],
)
def test_batches(batch: Any, args: tuple, kwargs: dict) -> None:
    got_args, got_kwargs, labels = split_batch(batch)
    assert len(got_args) == len(args)
    assert all(one is other for one, other in zip(got_args, args, strict=True))
    assert got_kwargs.keys() == kwargs.keys()
    assert all(got_kwargs[name] is kwargs[name] for name in kwargs)
    assert torch.equal(labels, Y)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (X, TypeError, r"a batch must be \(input, label\) or a dict, got Tensor"),
        ((X, Y, Y, Y), ValueError, r"must be \(input, label\) or a dict, got a tuple of 4"),
        ((X, Y, X), ValueError, r"tuple of 3 whose last entry \(float32 \(2, 3\)\) is no index"),
        ((X, Y, ["a", "b"]), ValueError, r"tuple of 3 whose last entry \(list\) is no index"),
        ({"x": X}, ValueError, r"needs the key 'labels' or 'label', got \['x'\]"),
        ((X, "ab"), TypeError, r"labels are text \('ab'\); map them to ids"),
        ((X, 1), ValueError, "labels must have one entry per sample, got a single number"),
    ],
)
def test_bad_batches(batch: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        split_batch(batch)


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
        (Twice(), None, ITEMS, {}, "head 'fc' was called more than once in one forward pass"),
        (Twice(), "unused", ITEMS, {}, "head 'unused' was not called in the forward pass"),
        (Dropping(), None, ITEMS, {}, r"got features \(3, 3\) for labels \(4,\)"),
        (Wide(), None, ITEMS, {}, r"must get \(N, D\) or \(B, T, D\) features, got \(1, 1, 4, 3\)"),
        (Image(), None, ITEMS, {}, r"so labels must have shape \(4, 2\), got \(4,\)"),
        (
            TinyForCausalLM(),
            None,
            sequences([1, 1], length=1),
            {"shift": True},
            r"got sequences of 1 token\(s\), which leaves nothing to predict",
        ),
        (
            net(fc=nn.Linear(3, 2)),
            None,
            DataLoader(ITEMS, batch_size=4, collate_fn=lambda b: (torch.ones(1, 3), Y[:1])),
            {},
            "the loader yields 2 samples of a data set of 6; every sample must come once",
        ),
    ],
)
def test_forward_passes_that_are_refused(
    model: nn.Module, head: str | None, data: Any, options: dict, message: str
) -> None:
    runner = capture(model, data, head, **options)
    with pytest.raises(ValueError, match=message):
        runner.run()
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
