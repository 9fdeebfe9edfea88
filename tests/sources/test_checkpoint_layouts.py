"""Weights from every layout that training leaves are the right ones bitwise, or refused by name."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import checkpoint_layouts as layouts
import pytest
import torch
from checkpoint_layouts import LOADS, OTHER_STATE, REFUSED, STATE, WITH_A_CHOICE, network, under
from checkpoint_reading import HEAD, assert_holds, into
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast import MoSoScorer
from moso_fast.sources.checkpoints.checkpoint import Checkpoint, load_state_dict, read
from moso_fast.sources.checkpoints.weights import ModelWeights


@pytest.mark.parametrize("name", LOADS)
def test_weights_of_a_file_are_those_that_were_saved(tmp_path: Path, name: str) -> None:
    content, lr = LOADS[name]
    torch.save(content, tmp_path / "x.pth")
    model = network()
    before = layouts.state_of(model)
    checkpoint = Checkpoint(tmp_path / "x.pth")
    loaded = read(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = ModelWeights(model, model[3]).resolve(loaded)
    assert_holds(fitted)
    assert fitted.notes == ()
    assert loaded.stated.rate(HEAD) == lr
    for was, now in zip(before.values(), model.state_dict().values(), strict=True):
        assert torch.equal(was, now), "the model is written to"


@pytest.mark.parametrize("name", LOADS)
def test_the_old_form_of_files_is_read_alike(tmp_path: Path, name: str) -> None:
    content, lr = LOADS[name]
    if name.startswith("whole"):  # it holds the source code of the classes, which torch refuses
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match=r"refuses \(Only persistent_load of storage"):
            read(Checkpoint(tmp_path / "x.pt"))
        return
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_holds(into(network(), tmp_path / "x.pt"))
    assert read(Checkpoint(tmp_path / "x.pt")).stated.rate(HEAD) == lr


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message, entry = REFUSED[name]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message) as caught:
        into(network(), tmp_path / "x.pth")
    assert "\n" not in str(caught.value) and "x.pth" in str(caught.value)
    if entry is not None:
        assert_holds(into(network(), tmp_path / "x.pth", entry))


@pytest.mark.parametrize("name", WITH_A_CHOICE)
def test_running_weights_come_before_averages_and_both_are_named(tmp_path: Path, name: str) -> None:
    content, taken, other = WITH_A_CHOICE[name]
    torch.save(content, tmp_path / "x.pth")
    fitted = into(network(), tmp_path / "x.pth")
    assert_holds(fitted)
    assert fitted.entry == f"{taken}."
    (note,) = fitted.notes
    assert f"those under {taken!r} are taken" in note and f"entry={other!r}" in note
    chosen = into(network(), tmp_path / "x.pth", other)
    assert_holds(chosen, OTHER_STATE)
    assert chosen.notes == ()


def test_an_average_that_alone_fits_is_not_taken_in_silence() -> None:
    narrow = {n: t for n, t in STATE.items() if not n.startswith("3.")}
    fitted = into(network(), {"state_dict": narrow, "state_dict_ema": STATE})
    assert_holds(fitted)
    assert (
        "weights under 'state_dict' do not fit the model, those under 'state_dict_ema' do"
        in (fitted.notes[0])
    )


def test_what_a_wrapper_adds_is_left_out_openly() -> None:
    fitted = into(network(), {**under("trunk."), "top.weight": torch.ones(2, 3)})
    assert_holds(fitted)
    assert "others beside them are left out: top.weight" in fitted.notes[0]


@pytest.mark.parametrize("prefix", ["", "module.", "model.net.", "_orig_mod.", "wrapped.module."])
@pytest.mark.parametrize("own", ["net", "module", "_orig_mod", "backbone"])
def test_a_wrapped_model_takes_what_its_inside_left(own: str, prefix: str) -> None:
    model = nn.Module()
    model.add_module(own, network())
    assert_holds(into(model, under(prefix)), prefix=f"{own}.")


def test_a_wrapper_with_weights_of_its_own_needs_them_all() -> None:
    model = nn.Module()
    model.net, model.top = network(), nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"2 missing \(top.weight, top.bias\)"):
        into(model, under("net."))
    assert_holds(into(torch.optim.swa_utils.AveragedModel(network()), STATE), prefix="module.")


def test_a_layer_that_fits_several_places_is_not_guessed() -> None:
    deep = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()
    with pytest.raises(ValueError, match="different weights that fit the model under '0' and '1'"):
        into(nn.Linear(4, 4), deep)
    assert torch.equal(into(nn.Linear(4, 4), deep, "1").tensors["weight"], deep["1.weight"])


def test_buffers_in_no_state_dict_are_left_out_where_they_are_the_models_own() -> None:
    model = network()
    model.register_buffer("table", torch.arange(4.0).sqrt(), persistent=False)
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool), persistent=False)
    stored = {"table": torch.arange(4.0).sqrt(), "mask": torch.ones(2, dtype=torch.uint8)}
    assert_holds(into(model, {**STATE, **stored}))
    assert_holds(into(model, {**STATE, "table": stored["table"].half()}))
    with pytest.raises(ValueError, match=r"1 unexpected \(table\)"):
        into(model, {**STATE, "table": torch.arange(4.0)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_weight_comes_once_or_twice_with_the_same_values() -> None:
    weight = torch.randn(5, 3)
    for state in ({"embed.weight": weight}, {"head.weight": weight}):
        assert torch.equal(into(Tied(), state).tensors["embed.weight"], weight)
    both = {"embed.weight": weight, "head.weight": weight.clone()}
    assert torch.equal(into(Tied(), both).tensors["embed.weight"], weight)
    both["head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"different values for embed.weight and head.weight"):
        into(Tied(), both)


def test_weight_norm_of_old_files_becomes_todays_by_torchs_own_hook() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    fitted = into(new, {"state_dict": {f"net.{n}": t for n, t in old.state_dict().items()}})
    assert fitted.entry == "names converted by torch"
    stored = old.state_dict()
    found = fitted.tensors
    assert torch.equal(found["0.parametrizations.weight.original0"], stored["0.weight_g"])
    assert torch.equal(found["0.parametrizations.weight.original1"], stored["0.weight_v"])


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run_and_the_weights_beside_it_are_read(
    tmp_path: Path, zipped: bool
) -> None:
    class Evil:
        def __init__(self, how: Any) -> None:
            self.how = how

        def __reduce__(self) -> Any:
            return self.how

    mark = tmp_path / "ran"
    for how in (
        (Path.touch, (mark,)),
        (os.mkdir, (str(mark),)),
        (exec, (f"open({str(mark)!r},'w')",)),
    ):
        file = tmp_path / "x.pt"
        torch.save({"a": Evil(how)}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"must be a state dict|weights_only=True refuses"):
            load_state_dict(file)
        torch.save({"hook": Evil((exec, how[1])), "model": STATE}, file)
        assert_holds(into(network(), file))
        assert not mark.exists()


def test_what_users_allowed_themselves_stays_allowed(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": layouts.Config()}, tmp_path / "x.pt")
    with torch.serialization.safe_globals([layouts.Config, Path, type(Path())]):
        before = set(torch.serialization.get_safe_globals())
        assert_holds(into(network(), tmp_path / "x.pt"))
        assert set(torch.serialization.get_safe_globals()) == before


def test_files_that_torch_cannot_read_without_code_say_so(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(ValueError, match="pickle_protocol above 2") as caught:
        read(Checkpoint(tmp_path / "x.pt"))
    assert "\n" not in str(caught.value)
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(ValueError, match=r"damaged or holds objects|cannot be read"):
        read(Checkpoint(tmp_path / "y.pt"))


def test_entries_are_checked() -> None:
    with pytest.raises(TypeError, match="entry must be a dotted name in the file or None, got 3"):
        Checkpoint(STATE, entry=3)
    with pytest.raises(ValueError, match=r"no weights under entry 'no'; it holds model \(dict"):
        into(network(), {"model": STATE}, "no")
    assert load_state_dict({"a": STATE}).keys() == STATE.keys()
    with pytest.raises(ValueError, match=r"choose with .*entry=.* from 'a', 'b'"):
        load_state_dict({"a": STATE, "b": STATE})
    assert read(Checkpoint({"a": STATE, "b": {}}, entry="a")).state.keys() == STATE.keys()


def test_a_table_names_the_entry_and_warns_once(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(8, 5), torch.arange(8) % 3)
    files = []
    for k in range(2):
        files.append(tmp_path / f"{k}.pth")
        torch.save({"state_dict": STATE, "state_dict_ema": OTHER_STATE}, files[-1])
    model = network()
    scorer = MoSoScorer(model, progress=False)
    with pytest.warns(UserWarning, match="entry='state_dict_ema'") as caught:
        table = scorer.score(data, files)
    assert len([w for w in caught if "state_dict_ema" in str(w.message)]) == 1
    assert [c["entry"] for c in table.provenance["checkpoints"]] == ["state_dict"] * 2
    assert torch.equal(
        table.scores, scorer.score(data, [STATE, layouts.state_of(layouts.SOURCE)]).scores
    )
    average = scorer.score(data, Checkpoint(files[0], entry="state_dict_ema"))
    assert torch.equal(average.scores, scorer.score(data, OTHER_STATE).scores)
    assert not torch.equal(average.scores, table.scores)


def test_names_that_become_one_without_wrappers_are_judged_as_they_are() -> None:
    def states(extra: dict[str, Tensor]) -> dict[str, Any]:
        one = torch.ones(2, 2)
        collides = {"b": one, "_orig_mod.b": 2 * one}
        return {"x": {"_orig_mod.weight": 3 * one, **extra}, "y": collides}

    model = nn.Linear(2, 2, bias=False)
    assert torch.equal(into(model, states({})).tensors["weight"], 3 * torch.ones(2, 2))
    for extra in ("_orig_mod.extra", "_orig_mod.scale.weight", "_orig_mod.x_extra_state"):
        with pytest.raises(ValueError, match=rf"1 unexpected \(x.{extra}\)"):
            into(model, states({extra: torch.ones(3)}))
    wrapped = nn.Module()
    wrapped._orig_mod = nn.Linear(2, 2, bias=False)
    fitted = into(wrapped, states({}))
    assert torch.equal(fitted.tensors["_orig_mod.weight"], 3 * torch.ones(2, 2))


LESS = {name: tensor for name, tensor in STATE.items() if name != "3.bias"}
MORE = {"x": torch.ones(2), "y": torch.ones(2)}


@pytest.mark.parametrize(
    ("states", "message"),
    [
        # Fewer names are missing.
        ({"a": LESS, "b": {"3.bias": STATE["3.bias"]}}, r"1 missing \(3.bias\); it holds"),
        # As many are missing, and fewer are not known.
        ({"a": {**LESS, **MORE}, "b": {**LESS, "z": torch.ones(2)}}, r"1 unexpected \(b.z\)"),
        # A name too many is nearer than one too few.
        ({"a": {**STATE, **MORE}, "b": LESS}, r"the model: 2 unexpected \(a.x, a.y\)"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_message_is_about_the_weights_that_are_nearest(
    states: dict[str, dict[str, Tensor]], message: str, turned: bool
) -> None:
    given = dict(reversed(states.items())) if turned else states
    with pytest.raises(ValueError, match=message):
        into(network(), given)


@pytest.mark.parametrize(
    "beside",
    [
        {"3.bias": STATE["3.bias"]},  # more names are missing there
        {**{n: t for n, t in LESS.items() if n != "0.weight"}, "3.bias": STATE["3.bias"],
         "u": torch.ones(2), "v": torch.ones(2), "w": torch.ones(2)},  # as many, and strange ones
    ],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_older_names_are_looked_for_where_the_weights_are_nearest(
    beside: dict[str, Tensor], turned: bool
) -> None:
    """Weight norm had other names once: torch's hooks know them, below the prefix of the model."""
    model = network()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    older = {name: tensor for name, tensor in STATE.items() if name != "0.weight"}
    direction = STATE["0.weight"]
    older["0.weight_v"] = direction
    older["0.weight_g"] = 2 * direction.norm(dim=1, keepdim=True)
    states = {"beside": beside, "model": older}
    fitted = into(model, dict(reversed(states.items())) if turned else states)
    weight = fitted.tensors["0.parametrizations.weight.original0"]
    assert torch.equal(weight, older["0.weight_g"])


@pytest.mark.parametrize("turned", [False, True])
def test_the_usual_place_comes_before_others_and_both_are_named(turned: bool) -> None:
    states = {"other": OTHER_STATE, "model": STATE}
    fitted = into(network(), dict(reversed(states.items())) if turned else states)
    assert_holds(fitted)
    (note,) = fitted.notes
    assert "those under 'model' are taken; Checkpoint(source, entry='other') takes others" in note


@pytest.mark.parametrize("value", [None, {"scale": 3}, "text", b"bytes"])
def test_extra_state_that_is_no_tensor(value: Any) -> None:
    """Among the weights of a container it tells of another network, elsewhere it tells nothing."""
    for beside in (
        {**STATE, "0._extra_state": value},
        {"model": STATE, "0._extra_state": value},
        {"model": {**under("net."), "other._extra_state": value}},
        {"model": STATE, "ema": {"0._extra_state": value}},
    ):
        assert_holds(into(network(), beside))
    if isinstance(value, dict):
        return  # its entries are looked at by their own names
    for prefix in ("", "module."):
        among = {"model": {**under(prefix), f"{prefix}0._extra_state": value}}
        with pytest.raises(ValueError, match=rf"1 unexpected \(model.{prefix}0._extra_state\)"):
            into(network(), among)
