"""Lists in the samples as a model takes them: the one trial that tells, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moso_fast.sources.data.list_inputs import ListInputs

LISTS = [[1, 2, 3], [4, 5, 6], [6, 5, 4], [3, 2, 1]]


def settled(forward: Any, rows: int = 4, dtype: Any = None, **more: Any) -> Any:
    """Return what a model with this forward gets of lists of three numbers, as it came."""
    came = [torch.tensor(column)[:rows] for column in zip(*LISTS, strict=True)]
    stacked = torch.stack(came, 1)
    model = type("Made", (nn.Module,), {"forward": forward})()
    inputs = ListInputs(model, dtype)
    kwargs = {"x": stacked, **more}
    first = inputs.settled((), kwargs, {id(stacked): came}, rows)
    assert str(inputs.settled((), kwargs, {id(stacked): came}, rows)) == str(first)
    return first[1]["x"]


def rows_of(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.stack(x, 1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: {"loss": torch.tensor(1.0), "logits": logits},
        lambda logits: {"first": logits, "last": logits[:1]},
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: ("text", logits),
    ],
)
def test_the_form_whose_outputs_have_a_row_a_sample(wrap: Any) -> None:
    as_list = settled(lambda self, x: wrap(rows_of(x)))
    assert isinstance(as_list, list), "both do, and torch's own comes first"

    def of_tensor(self: Any, x: Any) -> Any:
        return wrap(x.float())

    assert isinstance(settled(of_tensor), Tensor)
    assert isinstance(settled(lambda self, x: wrap(x[0])), list), "one field, or one sample"


def test_a_few_samples_tell_and_no_number_of_them_divides_a_size() -> None:
    seen = []

    def forward(self: Any, x: Any, y: Any, texts: Any, scale: Any) -> Tensor:
        if isinstance(x, list):
            raise TypeError("no list")
        seen.append((x.tolist(), y.dtype, texts, scale))
        return x

    more = {"y": torch.ones(4), "texts": list("abcd"), "scale": 3}
    settled(forward, dtype=torch.float64, **more)
    assert seen == [([[1, 2, 3], [4, 5, 6]], torch.float64, ["a", "b"], 3)], "2 divides no 3"
    of_two: Any = ListInputs(
        type("Made", (nn.Module,), {"forward": lambda self, x: seen.append(x)})()
    )
    column = [torch.arange(4), torch.arange(4)]
    stacked = torch.stack(column, 1)
    of_two.settled((stacked,), {}, {id(stacked): column}, 4)
    assert len(seen[-1]) == 3, "where there are two places, three samples tell"
    short = torch.stack([one[:2] for one in column], 1)
    of_two = ListInputs(of_two.model)
    of_two.settled((short,), {}, {id(short): [one[:2] for one in column]}, 2)
    assert seen[-1].tolist() == [[0, 0], [1, 1], [0, 0]], "samples come again where there are few"


def test_outputs_that_do_not_tell() -> None:
    """Tokens one after the other, outputs that are no tensor: a tensor, where both forms run."""
    for outputs in (torch.zeros(6, 5), torch.zeros(5, 2, 7), "text"):
        assert isinstance(settled(lambda self, x, outputs=outputs: outputs), Tensor)

        def only_lists(self: Any, x: list, outputs: Any = outputs) -> Any:
            return outputs if isinstance(x, list) else x.missing

        assert isinstance(settled(only_lists), list)

    def no_list(self: Any, x: Any) -> Any:
        raise TypeError("conv2d() received list") if isinstance(x, list) else ValueError("wrong")

    assert isinstance(settled(no_list), Tensor), "the message is of the list, not of the numbers"

    def numbers(self: Any, x: Any) -> Any:
        raise IndexError("list index out of range")

    assert isinstance(settled(numbers), list)

    def rows_of_wrong(self: Any, x: Any) -> Any:
        return torch.zeros(3, 5)

    with pytest.raises(ValueError) as caught:
        settled(rows_of_wrong)
    assert str(caught.value) == (
        "data: 'x' is a list in the samples, of which forward of Made makes 3 rows of 2 samples, "
        "given as a list or as a tensor; give a DataLoader whose collate_fn makes what the model "
        "takes"
    )
    unknown = ListInputs(None)
    came = [torch.arange(4)] * 2
    stacked = torch.stack(came, 1)
    args, kwargs = unknown.settled((stacked,), {}, {id(stacked): came}, 4)
    assert args[0] is came and kwargs == {}


@pytest.mark.parametrize("kept", ["parameter", "buffer"])
def test_the_trial_is_made_where_the_model_lies(kept: str) -> None:
    seen = []

    def forward(self: Any, x: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.extend(one.device.type for one in x)
        return torch.stack(x, 1)

    model = type("Made", (nn.Module,), {"forward": forward})()
    tensor = torch.ones(1, device="meta")
    if kept == "parameter":
        model.weight = nn.Parameter(tensor)
    else:
        model.register_buffer("weight", tensor)
    came = [torch.arange(4)] * 3
    stacked = torch.stack(came, 1)
    args, _ = ListInputs(model).settled((stacked,), {}, {id(stacked): came}, 4)
    assert args[0] is came and seen == ["meta"] * 3
