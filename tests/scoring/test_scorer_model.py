"""What the scorer does with a model and its checkpoints: few passes, and nothing left changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from scorer_cases import (
    RATES,
    N,
    SmallNet,
    checkpoints_of,
    images,
    same_table,
    scorer,
    trained,
)
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from moso_fast.sources.checkpoints.checkpoint import Checkpoint, read
from moso_fast.sources.checkpoints.weights import ModelWeights


@pytest.fixture(scope="module")
def model() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture(scope="module")
def states(model: SmallNet) -> list[dict[str, Tensor]]:
    return trained(model)


def test_model_is_left_as_it_was(states: list) -> None:
    torch.manual_seed(1)
    model = SmallNet().train()
    model.bn.eval()
    parameters = list(model.parameters())
    addresses = [t.data_ptr() for t in model.state_dict().values()]
    before = copy.deepcopy(model.state_dict())
    copies = copy.deepcopy(states)
    scorer(model).score(images(), checkpoints_of(states))
    assert [t.data_ptr() for t in model.state_dict().values()] == addresses
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert not model.fc._forward_pre_hooks
    for state, expected in zip(states, copies, strict=True):
        assert all(torch.equal(state[n], expected[n]) for n in expected)


def test_checkpoint_that_shares_memory_with_the_model(model: SmallNet, states: list) -> None:
    """state_dict() of the model itself as one of the checkpoints: not overwritten by the others."""
    own = copy.deepcopy(model)
    mixed = [states[0], own.state_dict(), states[1]]
    table = scorer(own).score(images(), mixed)
    expected = scorer(own).score(images(), copy.deepcopy(mixed))
    assert same_table(table, expected)


class Failing(Dataset):
    """Raises at one sample of the n-th pass."""

    def __init__(self, error: type[BaseException], at_pass: int) -> None:
        self.base, self.error, self.at_pass, self.passes = images(), error, at_pass, 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.passes += index == 0
        if self.passes == self.at_pass and index == 10:
            raise self.error("stopped on purpose")
        return self.base[index]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_model_is_left_as_it_was_after_an_exception(states: list, error: type) -> None:
    torch.manual_seed(1)
    model = SmallNet().train()
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        scorer(model).score(Failing(error, at_pass=2), checkpoints_of(states))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert not model.fc._forward_pre_hooks


def frozen_states(model: SmallNet, count: int, share: bool) -> list[dict[str, Tensor]]:
    """Checkpoints that differ in the head alone, with the backbone shared or copied."""
    generator = torch.Generator().manual_seed(2)
    result = []
    for _ in range(count):
        state = dict(model.state_dict()) if share else copy.deepcopy(model.state_dict())
        for name in ("fc.weight", "fc.bias"):
            state[name] = torch.randn(state[name].shape, generator=generator)
        result.append(state)
    return result


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_frozen_backbone_is_run_once(model: SmallNet, share: bool, stream: bool) -> None:
    model = copy.deepcopy(model)
    states = frozen_states(model, 4, share)
    model.forwards = 0
    table = scorer(model).score(images(), iter(states) if stream else states)
    assert model.forwards == 3  # batches of one pass
    assert table.per_checkpoint["alignment"].shape == (4, N)
    for k, state in enumerate(states):
        one = scorer(model).score(images(), [state])
        for name in ("alignment", "grad_sqnorm", "loss", "score"):
            torch.testing.assert_close(
                table.per_checkpoint[name][k], one.per_checkpoint[name][0], rtol=1e-5, atol=1e-6
            )


def test_one_forward_pass_a_checkpoint_when_the_backbone_moves(states: list) -> None:
    model = SmallNet()
    scorer(model).score(images(), checkpoints_of(states))
    assert model.forwards == 3 * len(states)


def test_backbone_that_comes_back_is_run_again(model: SmallNet, states: list) -> None:
    """Groups are consecutive: a, a', b, a takes three passes and keeps the order."""
    model = copy.deepcopy(model)
    near = dict(states[0])
    near["fc.bias"] = near["fc.bias"] + 1
    model.forwards = 0
    order = [states[0], near, states[1], copy.deepcopy(states[0])]
    table = scorer(model).score(images(), order)
    assert model.forwards == 9
    single = [scorer(model).score(images(), [s]).per_checkpoint["loss"][0] for s in order]
    torch.testing.assert_close(table.per_checkpoint["loss"], torch.stack(single))


def test_large_heads_are_scored_in_several_calls(
    model: SmallNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = frozen_states(model, 5, share=True)
    together = scorer(model).score(images(), states)
    model = copy.deepcopy(model)
    monkeypatch.setattr(
        "moso_fast.scoring.last_layer._HEADS_BYTES", 2 * model.fc.weight.numel() * 4
    )
    model.forwards = 0
    apart = scorer(model).score(images(), states)
    assert model.forwards == 3
    torch.testing.assert_close(apart.scores, together.scores)
    assert apart.per_checkpoint["loss"].shape == (5, N)


@pytest.mark.parametrize("alias", ["state_dict", "data"])
def test_generator_that_trains_the_same_tensors(states: list, alias: str) -> None:
    """Every state yielded is the same memory, with other values each time."""
    torch.manual_seed(4)
    live = SmallNet()

    def train() -> Iterator[Checkpoint]:
        for state, eta in zip(states, RATES, strict=True):
            live.load_state_dict(state)
            now = live.state_dict()
            yield Checkpoint({n: t.data if alias == "data" else t for n, t in now.items()}, lr=eta)

    for scored in (live, SmallNet()):
        table = scorer(scored).score(images(), train())
        expected = scorer(live).score(images(), checkpoints_of(states))
        assert same_table(table, expected)


def test_forgotten_copy_is_pointed_out(model: SmallNet) -> None:
    with pytest.warns(UserWarning, match=r"checkpoints 0 and 1 are the same tensors"):
        scorer(model).score(images(), [model.state_dict(), model.state_dict()])


def test_head_tied_to_an_embedding() -> None:
    """A tied weight decides the features too, and may be stored under one of its names."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 5)
            self.lm_head = nn.Linear(5, 9, bias=False)
            self.lm_head.weight = self.embed.weight
            self.forwards = 0

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            return self.lm_head(self.embed(x).mean(1))

    torch.manual_seed(0)
    model = Tied()
    data = TensorDataset(torch.randint(9, (12, 3)), torch.randint(9, (12,)))
    values = [torch.randn(9, 5) for _ in range(2)]
    both = [{"embed.weight": v, "lm_head.weight": v} for v in values]
    one = [{"embed.weight": values[0]}, {"lm_head.weight": values[1]}]
    table = scorer(model).score(data, both)
    assert model.forwards == 4
    assert same_table(scorer(model).score(data, one), table)
    inputs, labels = data.tensors
    logits = torch.stack([v[inputs].mean(1) @ v.T for v in values])
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(2), reduction="none")
    torch.testing.assert_close(table.per_checkpoint["loss"].flatten(), losses)


def test_under_inference_mode_and_autocast(model: SmallNet, states: list) -> None:
    expected = scorer(model).score(images(), checkpoints_of(states))
    with torch.inference_mode():
        loaded = [{n: t.clone() for n, t in s.items()} for s in states]
        table = scorer(model).score(images(), checkpoints_of(loaded))
    assert not table.scores.is_inference()
    assert same_table(table, expected)
    losses = []
    for state in states:
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(scorer(model).score(images(), [state]).metrics["loss"])
    inputs, _ = images().tensors
    with torch.autocast("cpu", torch.bfloat16):
        # Autocast keeps 16-bit copies of weights: neither the model's own, nor those of another
        # checkpoint, nor afterwards those of a checkpoint may be taken for the ones in force.
        before = copy.deepcopy(model).eval()(inputs)
        model.eval()(inputs)
        table = scorer(model).score(images(), checkpoints_of(states))
        after = model(inputs)
        model.train()
    assert torch.equal(table.per_checkpoint["loss"], torch.stack(losses))
    assert torch.equal(before, after)


def test_wrapped_models_and_states(model: SmallNet, states: list) -> None:
    expected = scorer(model).score(images(), checkpoints_of(states))
    prefixed = [{f"module.{n}": t for n, t in s.items()} for s in states]
    assert same_table(scorer(model).score(images(), checkpoints_of(prefixed)), expected)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert same_table(scorer(compiled).score(images(), checkpoints_of(states)), expected)


def replaced(state: dict[str, Tensor], **tensors: Tensor | None) -> dict[str, Tensor]:
    result = {**state, **{name.replace("__", "."): t for name, t in tensors.items()}}
    return {name: t for name, t in result.items() if t is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fc__weight": None, "bn__bias": None},
            "checkpoint (a state dict in memory) does not fit the model: "
            "2 missing (bn.bias, fc.weight)",
        ),
        (
            {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1), "d": torch.ones(1)},
            "checkpoint (a state dict in memory) does not fit the model: "
            "4 unexpected (a, b, c, ...)",
        ),
        (
            {"fc__weight": None, "head__weight": torch.ones(2)},
            "checkpoint (a state dict in memory) does not fit the model: "
            "1 missing (fc.weight); 1 unexpected (head.weight)",
        ),
        (
            {"fc__bias": torch.ones(3)},
            "checkpoint (a state dict in memory) does not fit the model: "
            "fc.bias has shape (3,), in the model (4,)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(
    model: SmallNet, states: list, change: dict, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        scorer(model).score(images(), [replaced(states[0], **change)])
    assert str(caught.value) == message


def test_state_that_is_no_tensor_of_the_model(states: list) -> None:
    class Extra(SmallNet):
        def get_extra_state(self) -> dict:
            return {"scale": 2}

        def set_extra_state(self, state: dict) -> None:
            pass

    model = Extra()
    with pytest.raises(ValueError, match=r"its state dict has '_extra_state', which is no tensor"):
        scorer(model).score(images(), states)
    assert scorer(model).score(images()).scores.shape == (N,)


def test_buffer_that_the_model_writes_to(states: list) -> None:
    """A counter in a buffer, say, goes up in our copy alone: not in the model, nor in the state."""

    class Counting(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            self.bn.num_batches_tracked += 1
            return super().forward(x)

    model = Counting()
    before = [int(state["bn.num_batches_tracked"]) for state in states]
    scorer(model).score(images(), states)
    scorer(model).score(images())
    assert [int(state["bn.num_batches_tracked"]) for state in states] == before
    assert int(model.bn.num_batches_tracked) == 0


def test_weights_on_loan(states: list) -> None:
    torch.manual_seed(6)
    model = SmallNet().eval()
    inputs, _ = images().tensors
    other = SmallNet().eval()
    other.load_state_dict(states[0])
    weights = ModelWeights(model, model.fc)
    with torch.autocast("cpu", torch.bfloat16):
        own, expected = model(inputs), other(inputs)
        with weights.lent(weights.resolve(read(Checkpoint(states[0]))).tensors):
            assert torch.equal(model(inputs), expected)
        assert torch.equal(model(inputs), own)
        with weights.lent(states[0], head_only=True):
            assert torch.equal(model.fc.weight, states[0]["fc.weight"])
            assert not torch.equal(model.conv.weight, states[0]["conv.weight"])
    with pytest.raises(KeyboardInterrupt), weights.lent(states[0]):
        raise KeyboardInterrupt
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), own)


def test_weights_on_loan_keep_the_memory_format_of_the_model(states: list) -> None:
    model = SmallNet().to(memory_format=torch.channels_last)
    model.conv.weight = nn.Parameter(torch.empty(3, 1, 3, 3).as_strided((3, 1, 3, 3), (9, 1, 3, 1)))
    weights = ModelWeights(model, model.fc)
    with weights.lent(states[0]):
        assert model.conv.weight.stride() == (9, 1, 3, 1)
        assert torch.equal(model.conv.weight, states[0]["conv.weight"])


def test_another_dtype_is_lent_to_buffers_too(states: list) -> None:
    model = SmallNet()
    model.register_buffer("scale", torch.ones(2), persistent=False)
    weights = ModelWeights(model, model.fc, dtype=torch.float64)
    with weights.lent(weights.resolve(read(Checkpoint(states[0]))).tensors):
        assert {t.dtype for t in model.parameters()} == {torch.float64}
        assert model.scale.dtype == model.bn.running_mean.dtype == torch.float64
        assert model.bn.num_batches_tracked.dtype == torch.int64
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert model.scale.dtype == torch.float32
