"""In full, what is said of checkpoints whose weights do not fit a model, or several of which do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import OTHER_STATE, STATE, averaged, network, under
from checkpoint_reading import assert_holds, into
from torch import nn

from moso_fast.sources.checkpoints.checkpoint import Checkpoint, iterate, load_state_dict, read
from moso_fast.sources.checkpoints.contents import contents_of
from moso_fast.sources.checkpoints.weights import ModelWeights

HERE = "checkpoint (a state dict in memory)"
MISFIT = f"{HERE} does not fit the model"
FIVE = {f"x{k}": torch.ones(2) for k in range(5)}
LAYER = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}


def said_of(content: Any, model: nn.Module | None = None, entry: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        into(network() if model is None else model, content, entry)
    return str(caught.value)


def test_names_that_are_missing_or_too_many() -> None:
    lacking = {name: t for name, t in STATE.items() if not name.startswith(("0.", "1."))}
    first = "0.weight, 0.bias, 1.weight, ..."
    assert said_of(lacking) == f"{MISFIT}: 6 missing ({first})"
    assert said_of({**STATE, **FIVE}) == f"{MISFIT}: 5 unexpected (x0, x1, x2, ...)"
    three = dict(list(FIVE.items())[:3])
    assert said_of({**STATE, **three}) == f"{MISFIT}: 3 unexpected (x0, x1, x2)"
    del lacking["3.bias"]
    assert said_of({"a": {**lacking, "x": torch.ones(1)}, "n": 3}) == (
        f"{MISFIT}: 7 missing ({first}); 1 unexpected (a.x); it holds a (dictionary of 2), n (int)"
    )


def test_shapes_that_differ() -> None:
    wide = {"weight": torch.ones(4, 2), "bias": torch.ones(4)}
    layer = nn.Linear(2, 3)
    assert said_of(wide, layer) == f"{MISFIT}: weight has shape (4, 2), in the model (3, 2)"
    one = {"weight": torch.ones(4, 2), "x": torch.ones(1)}
    assert said_of(one, layer) == (
        f"{MISFIT}: 1 missing (bias); 1 unexpected (x); 1 of another shape (weight)"
    )
    assert said_of({**wide, "x": torch.ones(1)}, layer) == (
        f"{MISFIT}: 1 unexpected (x); 2 of another shape (weight, bias)"
    )


def test_nothing_that_could_be_meant() -> None:
    layer = nn.Linear(2, 3)
    assert said_of({"a": torch.ones(1)}, layer) == (
        f"{MISFIT}: 2 missing (weight, bias); 1 unexpected (a)"
    )
    assert said_of({"optimizer": LAYER}, layer) == (
        f"{MISFIT}: 2 missing (weight, bias); its tensors lie under names of optimisers, gradients "
        "and the like, which are searched with Checkpoint(source, entry=...) alone; it holds "
        "optimizer (dictionary of 2)"
    )
    for entry in ("b", "a.", "a.weight.x"):
        found = {"a": LAYER, "b": {}} if entry == "b" else {"other": LAYER}
        holds = said_of(found, layer, entry).partition("; it holds ")
        assert holds[0] == f"{HERE} has no weights under entry {entry!r}"
        assert holds[2].endswith("(dictionary of 2)" if entry != "b" else "b (dictionary of 0)")
    assert said_of(LAYER, layer, "net") == f"{HERE} has no weights under entry 'net'"


def test_a_copy_within_the_weights_is_offered() -> None:
    inside = {**OTHER_STATE, **under("ema.")}
    names = "ema.0.weight, ema.0.bias, ema.1.weight, ..."
    assert said_of(inside) == (
        f"{MISFIT}: 8 unexpected ({names}); others that fit it alone lie below 'ema': take those "
        "with Checkpoint(source, entry='ema'), or save those of the model alone"
    )
    assert_holds(into(network(), inside, "ema"))
    assert_holds(into(network(), inside, "ema."))


def test_several_that_fit() -> None:
    two = {"a": STATE, "b": OTHER_STATE}
    choose = "holds different weights that fit the model under"
    assert said_of(two) == (
        f"{HERE} {choose} 'a' and 'b'; choose one with Checkpoint(source, entry='a') or another"
    )
    four = {f"e{k}": {n: t + k for n, t in STATE.items()} for k in range(4)}
    assert said_of(four) == (
        f"{HERE} {choose} 'e0' and 'e1' and 'e2'; choose one with Checkpoint(source, entry='e0') "
        "or another"
    )
    for other in ("model_ema", "swa", "average", "averaged", "avg", "polyak", "shadow", "Best"):
        fitted = into(network(), {other: averaged(network(2)), "x": STATE})
        assert_holds(fitted)
        assert fitted.notes == (
            f"{HERE} {choose} '{other}.module' and 'x'; those under 'x' are taken; "
            f"Checkpoint(source, entry='{other}.module') takes others",
        )


def test_many_that_fit_are_not_guessed_from() -> None:
    """A layer that fits all over a file: the usual place is no better than the others."""
    layers = {f"l{k}": {n: t + k for n, t in LAYER.items()} for k in range(20)}
    few = dict(list(layers.items())[:13])
    model = nn.Linear(2, 3)
    fitted = into(model, {**few, "state_dict": {n: -t for n, t in LAYER.items()}})
    assert torch.equal(fitted.tensors["bias"], -LAYER["bias"])
    assert "choose one with" in said_of({**layers, "state_dict": LAYER}, model)


def test_an_average_where_the_usual_place_does_not_fit() -> None:
    narrow = {n: t for n, t in STATE.items() if not n.startswith("3.")}
    for usual in ("state_dict", "model_state_dict", "model", "net"):
        fitted = into(network(), {usual: narrow, "ema": STATE})
        assert_holds(fitted)
        assert fitted.notes == (
            f"{HERE}: weights under {usual!r} do not fit the model, those under 'ema' do and are "
            "taken",
        )
    assert into(network(), {"other": narrow, "ema": STATE}).notes == ()


def test_weights_beside_those_of_the_model() -> None:
    beside = {**under("net."), **FIVE}
    fitted = into(network(), beside)
    assert_holds(fitted)
    assert fitted.entry == "net." and fitted.notes == (
        f"{HERE}: the weights below 'net' are those of the model; others beside them are left out: "
        "x0, x1, x2, ...",
    )
    assert into(network(), beside, "net").notes == ()
    for name in ("loss.w", "criterion.w", "metrics.a", "acc5.total", "val_loss", "my_teacher.w"):
        assert into(network(), {**under("net."), name: torch.ones(2)}).notes == ()
    for number in (torch.tensor(1.0), torch.ones(2).long()):
        assert into(network(), {**under("net."), "x": number}).notes == ()


def test_numbers_of_another_kind() -> None:
    layer = nn.Linear(2, 3)
    end = "quantised or packed weights need the model in the same form"
    for weight, held in (
        (torch.ones(3, 2).int(), "torch.int32"),
        (torch.ones(3, 2, dtype=torch.complex64), "torch.complex64"),
        (torch.empty(3, 2, device="meta"), "no values (a meta tensor)"),
        (torch.ones(3, 2).to_sparse(), "torch.float32"),
    ):
        assert said_of({**LAYER, "weight": weight}, layer) == (
            f"{MISFIT}: weight holds {held}, and the model torch.float32; {end}"
        )
    counts = nn.Module()
    counts.register_buffer("ids", torch.tensor([1, 2]))
    assert said_of({"ids": torch.tensor([1.0, 2.5])}, counts) == (
        f"{MISFIT}: ids holds torch.float32, and the model torch.int64; {end}"
    )
    whole = into(counts, {"ids": torch.tensor([3.0, 4.0])})
    assert whole.tensors["ids"].tolist() == [3, 4], "numbers that only look like fractions"
    counter = {**STATE, "1.num_batches_tracked": torch.tensor(2.5)}
    assert_holds(into(network(), counter))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


def test_ties_that_do_not_hold() -> None:
    one, other = torch.ones(2, 2), torch.zeros(2, 2)
    tied = f"{MISFIT}: it has different values for"
    end = "which are one tied weight of the model"
    for second in (other, one.double(), one.half()):
        assert said_of({"a.weight": one, "b.weight": second}, Tied()) == (
            f"{tied} a.weight and b.weight, {end}"
        )
    assert into(Tied(), {"a.weight": one, "b.weight": one}).notes == ()


def test_what_a_state_dict_cannot_exchange() -> None:
    model = nn.Linear(2, 3)
    model.register_state_dict_post_hook(lambda m, state, prefix, _: state.update(odd=torch.ones(1)))
    with pytest.raises(ValueError) as caught:
        ModelWeights(model, None).resolve(read(Checkpoint(LAYER)))
    assert str(caught.value) == (
        "model: its state dict has 'odd', which is no tensor of the model and cannot be exchanged; "
        "load each checkpoint yourself and score it with checkpoints=None"
    )


def test_a_state_dict_that_is_asked_for_without_a_model() -> None:
    def error(content: Any, **how: Any) -> str:
        with pytest.raises(ValueError) as caught:
            _ = read(Checkpoint(content, **how)).state
        return str(caught.value)

    choose = "must be a state dict of tensors, or hold one; choose with Checkpoint(source, "
    assert error({"a": STATE, "b": STATE}) == f"{HERE} {choose}entry=...) from 'a', 'b'"
    assert error({"optimizer": STATE}) == f"{HERE} {choose}entry=...) from nothing"
    assert error({"epoch": 3}) == (
        f"{HERE} must be a state dict of tensors, or hold one; it holds epoch (int)"
    )
    for usual in ("net", "model", "model_state_dict", "state_dict"):
        both = {"a": OTHER_STATE, usual: STATE}
        assert load_state_dict(both).keys() == STATE.keys()
        assert load_state_dict(both)["3.bias"] is STATE["3.bias"]
    order = {"net": STATE, "state_dict": OTHER_STATE}
    assert load_state_dict(order)["3.bias"] is OTHER_STATE["3.bias"]
    deep = {"a": {"b": STATE, "c": {"w": STATE["3.bias"]}}}
    for entry in ("a.b", "a.b."):
        found = read(Checkpoint(deep, entry=entry)).state
        assert found.keys() == STATE.keys()
    below = read(Checkpoint(deep, entry="a")).state
    assert below.keys() == {"c.w", *(f"b.{name}" for name in STATE)}
    gradients = read(Checkpoint({"grads": STATE}, entry="grads")).state
    assert gradients.keys() == STATE.keys()


def test_what_a_dictionary_holds_in_words() -> None:
    def words(content: Any) -> str:
        return contents_of(content, "x").keys

    assert words(STATE) == words({}) == ""
    assert words({"a": 1, "b": {"c": 2}, "d": torch.ones(2, 3), 7: None}) == (
        "a (int), b (dictionary of 1), d (tensor (2, 3)), 7 (NoneType)"
    )
    many = {f"k{k}": k for k in range(14)}
    listed = ", ".join(f"k{k} (int)" for k in range(12))
    assert words(many) == f"{listed}, and 2 more"
    assert words(dict(list(many.items())[:12])) == listed
    with pytest.raises(ValueError) as caught:
        contents_of({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "x.pt")
    assert str(caught.value) == (
        "checkpoint (x.pt) has two tensors named 'a.b', in nested dictionaries and by a dotted "
        "name; save one state dict"
    )


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: Checkpoint(3),  # type: ignore[arg-type]
            TypeError,
            "Checkpoint source must be a state dict or a path, got int",
        ),
        (
            lambda: Checkpoint(STATE, step=True),
            TypeError,
            "Checkpoint step must be an int or None, got True",
        ),
        (
            lambda: Checkpoint(STATE, entry="."),
            TypeError,
            "Checkpoint entry must be a dotted name in the file or None, got '.'",
        ),
        (
            lambda: Checkpoint(STATE, lr=-1),
            ValueError,
            "Checkpoint lr must be a number >= 0, got -1.0",
        ),
        (
            lambda: iterate(5),
            TypeError,
            "checkpoints must be an iterable of Checkpoint, got int",
        ),
        (
            lambda: list(iterate(iter([STATE, 5]))),
            TypeError,
            "checkpoints[1] must be a Checkpoint, a state dict or a path, got int",
        ),
        (
            lambda: list(iterate(())),
            ValueError,
            "checkpoints is empty; give at least one Checkpoint, or None for the model as it is",
        ),
        (
            lambda: read(Checkpoint({"net": STATE, "lr": -1.0})),
            ValueError,
            "learning rate in a state dict in memory must be a number >= 0, got -1.0",
        ),
        (
            lambda: iterate([{"net": STATE, "lr": 1.0}, STATE]),
            ValueError,
            "checkpoints: either all have a learning rate or none, but checkpoint 0 has one and "
            "checkpoint 1 has none; give Checkpoint(source, lr=...) for each (without: a state "
            "dict in memory)",
        ),
    ],
)
def test_arguments_that_are_wrong(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value) == message


def test_a_file_is_called_by_its_path(tmp_path: Path) -> None:
    torch.save({"model": LAYER, "epoch": 2}, tmp_path / "x.pt")
    said = said_of(tmp_path / "x.pt", nn.Linear(2, 4))
    assert said.startswith(f"checkpoint ({tmp_path}/x.pt) does not fit the model: ")
    loaded = read(Checkpoint(tmp_path / "x.pt", step=7))
    assert (loaded.step, loaded.description) == (7, f"{tmp_path}/x.pt") and loaded.lr is None
    assert read(Checkpoint(tmp_path / "x.pt")).step == 2
