"""What of a dict batch the forward of a model gets, by its signature."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from library_stand_ins import PeftModel, of_module
from torch import Tensor, nn

from moso_fast.sources.data.arguments import Arguments, decoder_inputs, innermost

A, B = torch.ones(2, 3), torch.zeros(2, 3)


def model(forward: Any, *bases: type) -> nn.Module:
    """Make a network of the class ``Made`` with this forward."""
    return type("Made", (*bases, nn.Module), {"forward": forward})()


class PreTrainedModel(nn.Module):
    pass


of_module(PreTrainedModel, "transformers.modeling_utils")


def chosen(arguments: Arguments, **entries: Any) -> Any:
    """Return what is chosen, without a notice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return arguments.choose(entries)


def noticed(arguments: Arguments, **entries: Any) -> Any:
    with pytest.warns(UserWarning) as caught:
        found = arguments.choose(entries)
    (one,) = caught
    said = str(one.message).partition(" of a batch left out, which forward of Made does not take ")
    assert said[2] == "(columns= chooses what it gets)"
    return found, said[0].removeprefix("data: ")


def error_of(arguments: Arguments, **entries: Any) -> str:
    with pytest.raises(ValueError) as caught:
        arguments.choose(entries)
    return str(caught.value)


def test_what_the_signature_says() -> None:
    def forward(self: Any, x: Any, /, y: Any, z: Any = 1, *, k: Any, m: Any = 2) -> None: ...

    found = Arguments(model(forward))
    assert (found.kind, found.named) == ("Made", {"y", "z", "k", "m"})
    assert (found.required, found.places, found.anything) == (["x", "y", "k"], 3, False)
    assert found.accepts("k") and not found.accepts("x") and not found.accepts("other")
    assert found.gets("k") and not found.gets("other")
    any_place = Arguments(model(lambda self, x, *rest: None))
    assert any_place.places == float("inf") and any_place.required == ["x"]
    assert not any_place.anything
    any_name = Arguments(model(lambda self, x=1, **rest: None))
    assert any_name.anything and any_name.places == 1 and any_name.named == {"x"}
    assert any_name.accepts("other") and any_name.gets("other")
    none = Arguments(None)
    assert (none.kind, none.anything, none.places) == ("the model", True, float("inf"))
    assert none.accepts("other") and none.gets("other") and none.required == []


def test_hooks_may_add_what_is_missing_and_builtins_have_no_signature() -> None:
    hooked = model(lambda self, x, y: None)
    hooked.register_forward_pre_hook(lambda *_: None)
    assert Arguments(hooked).required == [] and Arguments(hooked).places == 2
    without = model(lambda self: None)
    without.forward = type("Call", (), {"__signature__": 3})()  # type: ignore[assignment]
    found = Arguments(without)
    assert found.anything and found.kind == "Made" and found.places == float("inf")


def test_wrappers_are_opened() -> None:
    inner = model(lambda self, x: None)
    adapted = PeftModel(nn.DataParallel(inner))
    for wrapped in (inner, nn.DataParallel(inner), adapted, nn.DataParallel(adapted)):
        assert innermost(wrapped) is inner and Arguments(wrapped).named == {"x"}


def test_columns_are_names() -> None:
    wanted = ["x"]
    assert Arguments(None, "x").columns == Arguments(None, ("x",)).columns == wanted
    for columns, shown in (([], "[]"), ([1], "[1]"), (("x", None), "['x', None]")):
        with pytest.raises(TypeError) as caught:
            Arguments(None, columns)  # type: ignore[arg-type]
        assert str(caught.value) == f"columns must be names of entries of a batch, got {shown}"


def test_entries_go_by_their_names() -> None:
    one = model(lambda self, x, y=None: None)
    assert chosen(Arguments(one), x=A, y=B) == ((), {"x": A, "y": B})
    assert chosen(Arguments(one, ["x"]), x=A, y=B, z="text") == ((), {"x": A})
    assert noticed(Arguments(one), x=A, z=B, t="text") == (((), {"x": A}), "'z', 't'")
    arguments = Arguments(one)
    noticed(arguments, x=A, z=B)
    assert chosen(arguments, x=A, z=B) == ((), {"x": A}), "once is enough"


def test_a_single_input_may_have_another_name() -> None:
    one = model(lambda self, x: None)
    assert chosen(Arguments(one), image=A) == ((A,), {})
    assert noticed(Arguments(one), image=A, t="text", n=torch.ones(2)) == (((A,), {}), "'t', 'n'")
    numbers = torch.ones(2)
    assert chosen(Arguments(one), n=numbers) == ((numbers,), {})
    nothing = model(lambda self: None)
    assert chosen(Arguments(nothing), image=A) == ((A,), {})
    # By columns= the caller says which, of whatever kind, and as many as are needed.
    two = model(lambda self, x, y: None)
    assert chosen(Arguments(two, ["b", "a"]), a=A, b="text") == (("text", A), {})
    assert chosen(Arguments(one, ["t"]), a=A, t="text") == (("text",), {})


def test_what_cannot_be_told_is_refused() -> None:
    end = "; rename the entry, or choose the model's input with columns="
    one, two = model(lambda self, x: None), model(lambda self, x, y: None)
    needs = "data: forward of Made needs"
    assert error_of(Arguments(one), a=A, b=B) == f"{needs} 'x', and a batch has 'a', 'b'{end}"
    assert error_of(Arguments(two), x=A, b=B) == f"{needs} 'y', and a batch has 'x', 'b'{end}"
    assert error_of(Arguments(two), a=A, b=B) == f"{needs} 'x', and a batch has 'a', 'b'{end}"
    assert error_of(Arguments(one)) == f"{needs} 'x', and a batch has nothing but labels{end}"
    assert error_of(Arguments(two), x=A) == f"{needs} 'y', and a batch has 'x'{end}"
    assert error_of(Arguments(one, ["a", "b"]), a=A, b=B) == (
        f"{needs} 'x', and a batch has 'a', 'b'{end}"
    )
    assert error_of(Arguments(one, ["c"]), a=A, b=B) == (
        "columns: a batch has no 'c'; it has 'a', 'b'"
    )
    several = model(lambda self, x, w=1, k=2: None)
    assert error_of(Arguments(several, ["x", "z"]), x=A, z=B) == (
        "columns: forward of Made takes no 'z'; it takes k, w, x"
    )


def test_models_that_take_anything() -> None:
    anything = model(lambda self, x, **rest: None)
    entries: dict[str, Any] = {"x": A, "text": "a", "n": 3}
    assert chosen(Arguments(anything), **entries) == ((), entries)
    assert chosen(Arguments(None), **entries) == ((), entries)
    # Of transformers, only what is no text means anything.
    library = Arguments(model(lambda self, x, **rest: None, PreTrainedModel))
    texts = {"bytes": b"a", "list": ["a"], "nested": [("a",)], "none": []}
    found, said = noticed(library, **entries, **texts)
    assert found == ((), {"x": A, "n": 3, "none": []})
    assert said == "'text', 'bytes', 'list', 'nested'"
    assert library.gets("x") and not library.gets("other") and library.accepts("other")
    assert Arguments(anything, ["x"]).gets("x") and not Arguments(anything, ["x"]).gets("y")


class Decodes(nn.Module):
    """As an encoder-decoder of transformers: with a method of its own, or with labels."""

    def __init__(self, own: bool, encodes: bool = True, generates: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=encodes)
        self.generates = generates
        if own:
            self.prepare_decoder_input_ids_from_labels = lambda labels: labels + 1

    def can_generate(self) -> bool:
        return self.generates

    def forward(self, x: Tensor, decoder_input_ids: Any = None, labels: Any = None) -> None: ...


LABELS = torch.tensor([[1, 2], [3, 4]])


def decoded(network: Any, labels: Tensor = LABELS, **kwargs: Any) -> dict[str, Any]:
    return decoder_inputs(network, Arguments(network), {"x": A, **kwargs}, labels)


def test_the_inputs_of_a_decoder() -> None:
    with_own = decoded(nn.Sequential(Decodes(own=True)))
    assert with_own.keys() == {"x"}, "forward of the whole takes none"
    found = decoded(Decodes(own=True))
    assert found.keys() == {"x", "decoder_input_ids"} and found["x"] is A
    assert torch.equal(found["decoder_input_ids"], LABELS + 1)
    assert decoded(Decodes(own=False)) == {"x": A, "labels": LABELS}
    for unchanged in (
        decoded(Decodes(own=False, generates=False)),
        decoded(Decodes(own=True, encodes=False)),
        decoded(Decodes(own=True), LABELS[0]),
        decoded(Decodes(own=True), LABELS.float()),
        decoded(None),
        decoded(nn.Linear(3, 1)),
    ):
        assert unchanged == {"x": A}
    for name in ("decoder_input_ids", "decoder_inputs_embeds"):
        assert decoded(Decodes(own=True), **{name: B}) == {"x": A, name: B}
