"""moso_scores and its relatives on arrays and lists: the numbers of the same tensors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from core_support import random_case

from moso_fast.functional import explain, last_layer_stats, moso_scores

NAMES = ("features", "weight", "labels", "bias", "sample_weight", "cu_seqlens")


def arguments(heads: int | None = None) -> dict[str, torch.Tensor]:
    case = random_case("ids", n=20, heads=heads, dtype=torch.float64)
    values = (*case.args, torch.linspace(0.5, 2, 20), torch.tensor([0, 4, 9, 20]))
    return dict(zip(NAMES, values, strict=True))


def read_only(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


FORMS = {
    "numpy": lambda t: t.numpy(),
    "read-only": lambda t: read_only(t.numpy().copy()),
    "reversed twice": lambda t: t.flip(0).numpy()[::-1],
    "big-endian": lambda t: t.numpy().astype(t.numpy().dtype.newbyteorder(">")),
    "list": lambda t: t.tolist(),
}


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_scores_of_arrays_are_those_of_tensors(form, heads):
    given = arguments(heads)
    given["sample_weight"] = given["sample_weight"].double()
    other = {name: FORMS[form](value) for name, value in given.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = moso_scores(**other, formula="one_step")
        stats = last_layer_stats(**other)
        text = explain(**other)
    assert torch.equal(scores, moso_scores(**given, formula="one_step"))
    assert torch.equal(stats.loss, last_layer_stats(**given).loss)
    assert text.splitlines()[0] == explain(**given).splitlines()[0]


@pytest.mark.parametrize("name", NAMES)
def test_one_array_among_tensors_is_enough(name):
    given = arguments()
    scores = moso_scores(**{**given, name: given[name].numpy()})
    assert torch.equal(scores, moso_scores(**given))
    with pytest.raises(TypeError, match=f"^{name} must hold numbers; it holds text"):
        moso_scores(**{**given, name: ["a", "b"]})


def test_features_are_not_copied():
    """Nor written to: the memory may be that of somebody else's table."""
    given = arguments()
    before = given["features"].clone()
    seen = given["features"].numpy()
    moso_scores(seen, given["weight"], given["labels"])
    assert np.array_equal(seen, before.numpy())
