"""The learning rate of a checkpoint: that of the scored parameters, no silent 0 or first one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import STATE, network, state_of, stepped, under
from checkpoint_reading import trainer
from torch import nn
from torch.utils.data import TensorDataset

from moso_fast import MoSoScorer
from moso_fast.sources.checkpoints.checkpoint import Checkpoint, load_state_dict, read
from moso_fast.sources.checkpoints.rates import ScoredParameters, groups_of
from moso_fast.sources.heads import read_head

DATA = TensorDataset(
    torch.randn(8, 5, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3
)
ZERO = "learning rates are all 0, which would make every score 0"


def score(checkpoints: Any, combine: str = "mean", **options: Any) -> Any:
    model = options.pop("model", None) or network()
    scorer = MoSoScorer(model, progress=False, **options)
    return scorer.score(DATA, checkpoints, combine=combine)


def rates(table: Any) -> list[float | None]:
    return [c["lr"] for c in table.provenance["checkpoints"]]


def counting(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("gradient", ["last_layer", "full"])
def test_the_end_of_a_schedule_is_refused_before_any_work(
    tmp_path: Path, as_list: bool, gradient: str
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    last = tmp_path / "last.pth"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, last)
    calls = counting(model)
    with pytest.raises(ValueError, match=ZERO) as caught:
        score([last] if as_list else last, model=model, gradient=gradient)
    assert "Checkpoint(source, lr=...)" in str(caught.value) and "\n" not in str(caught.value)
    assert not calls
    given = score(Checkpoint(last, lr=0.1), model=model, gradient=gradient)
    assert given.scores.abs().max() > 0


def test_a_zero_among_others_is_one_warning_that_names_it() -> None:
    states = [Checkpoint(state_of(network(k)), lr=lr) for k, lr in enumerate((0.1, 0.0, 0.2, 0.0))]
    with pytest.warns(UserWarning, match="checkpoints 1 .*, 3 .* have learning rate 0") as caught:
        table = score(states)
    assert len(caught) == 1
    assert rates(table) == [0.1, 0.0, 0.2, 0.0]
    with pytest.warns(UserWarning, match="have learning rate 0"):
        streamed = score(iter(states))
    assert torch.equal(streamed.scores, table.scores)


def test_standardised_scores_need_no_rate() -> None:
    states = [Checkpoint(state_of(network(k)), lr=0.0) for k in range(2)]
    with pytest.raises(ValueError, match=ZERO):
        score(states)
    with pytest.raises(ValueError, match=ZERO):
        score(iter(states))
    with pytest.warns(UserWarning, match="all 0 .*self_influence is 0"):
        table = score(states, "zscore")
    expected = score([Checkpoint(c.source, lr=0.3) for c in states], "zscore")
    assert torch.equal(table.scores, expected.scores)


@pytest.mark.parametrize("file", [True, False])
def test_the_rate_is_that_of_the_group_with_the_head(tmp_path: Path, file: bool) -> None:
    content: Any = {"model": STATE, "optimizer": stepped(1e-4, 1e-2)}
    if file:
        torch.save(content, tmp_path / "x.pth")
        content = tmp_path / "x.pth"
    table = score([content])
    assert rates(table) == [1e-2]
    assert torch.equal(table.scores, score([Checkpoint(content, lr=1e-2)]).scores)
    with pytest.raises(
        ValueError, match=r"learning rates 0\.0001, 0\.01, and parameters that are "
    ):
        score([content], gradient="full")
    assert rates(score([content], gradient="full", scope=["3"])) == [1e-2]
    assert rates(score([content], gradient="full", scope=["0"])) == [1e-4]


def test_names_in_an_optimiser_decide() -> None:
    model = network()
    groups = [
        {"params": list(model[3].named_parameters("3")), "lr": 0.5},
        {"params": list(model[:3].named_parameters())},
    ]
    state = torch.optim.SGD(groups, lr=0.1).state_dict()
    assert rates(score([{"model": STATE, "optimizer": state}])) == [0.5]
    assert rates(score([{"model": under("net."), "optim": state}])) == [0.5]


def test_without_names_or_memory_of_shapes_it_cannot_be_told() -> None:
    plain = {"model": STATE, "optimizer": stepped(1e-4, 1e-2, momentum=0.0)}
    message = (
        r"2 parameter groups with learning rates 0\.0001, 0\.01, and it cannot be told .*'3\.we"
    )
    with pytest.raises(ValueError, match=message) as caught:
        score([plain])
    assert "give the rate with Checkpoint(source, lr=...)" in str(caught.value)
    assert rates(score([Checkpoint(plain, lr=0.5)])) == [0.5]
    with pytest.warns(UserWarning, match="self_influence is taken with rate 1"):
        table = score([plain], "zscore")
    assert rates(table) == [None]
    with pytest.raises(ValueError, match="it cannot be told which of them"):
        score(iter([plain]))
    same = {"model": STATE, "optimizer": stepped(0.5, 0.5, momentum=0.0)}
    assert rates(score([same])) == [0.5]


def test_a_shape_that_others_share_is_told_only_where_the_rates_agree() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(
        [{"params": m.parameters(), "lr": k + 1.0} for k, m in enumerate(model)]
    )
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scored = ScoredParameters({"1.weight": (4, 4)}, "the head", {(4, 4): 2})
    stated = read(Checkpoint({"model": model.state_dict(), "opt": optimizer.state_dict()})).stated
    with pytest.raises(ValueError, match="other parameters have its shape"):
        stated.rate(scored)


def test_a_head_that_was_not_trained_is_not_taken_for_another_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [{"params": m.parameters(), "lr": k + 1.0} for k, m in enumerate(model)]
    optimizer = torch.optim.Adam(groups)
    model[0](torch.ones(1, 4)).sum().backward()  # of the head, nothing is remembered
    optimizer.step()
    stated = read(Checkpoint({"model": model.state_dict(), "opt": optimizer.state_dict()})).stated
    head = ScoredParameters({"1.weight": (4, 4)}, "the head", {(4, 4): 2})
    with pytest.raises(ValueError, match=r"it cannot be told which of them holds '1\.weight'"):
        stated.rate(head)


def test_layers_that_were_not_trained_leave_the_head_known() -> None:
    model = network()
    groups = [
        {"params": list(model[:3].parameters())},
        {"params": list(model[3].parameters()), "lr": 0.5},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    model[3](torch.ones(2, 8)).sum().backward()  # nothing is remembered of the others
    optimizer.step()
    assert rates(score([{"model": STATE, "optimizer": optimizer.state_dict()}])) == [0.5]


def test_two_optimisers_and_groups_by_number() -> None:
    model = network()
    body = torch.optim.Adam(model[:3].parameters(), lr=0.1)
    head = torch.optim.Adam(model[3].parameters(), lr=0.5)
    model(torch.ones(2, 5)).sum().backward()
    body.step()
    head.step()
    states = [body.state_dict(), head.state_dict()]
    assert rates(score([{"state_dict": STATE, "optimizer_states": states}])) == [0.5]
    named = {"state_dict": STATE, "optimizers": {"body": states[0], "head": states[1]}}
    assert rates(score([named])) == [0.5]
    assert groups_of({"param_groups": None}, "x") == []


def test_a_scheduler_with_several_rates_needs_the_groups() -> None:
    alone = {"model": STATE, "scheduler": {"_last_lr": [0.1, 0.5]}}
    with pytest.raises(ValueError, match=r"learning rates 0\.1, 0\.5 for several parameter groups"):
        score([alone])
    assert rates(score([{**alone, "optimizer": stepped(0.1, 0.5)}])) == [0.5]
    assert rates(score([{"model": STATE, "scheduler": {"_last_lr": [0.5, 0.5]}}])) == [0.5]


def test_missing_rates_are_filled_from_the_files_beside(tmp_path: Path) -> None:
    logged = trainer(tmp_path / "a", 6, [{"learning_rate": 0.25}], optimizer=stepped(0.125))
    silent = trainer(tmp_path / "b", 3, [], optimizer=stepped(1e-4, 0.5))
    scheduled = trainer(tmp_path / "c", 9, [], scheduler={"_last_lr": [0.75]})
    bare = trainer(tmp_path / "d", 9, [])
    assert rates(score([silent, logged, scheduled])) == [0.5, 0.25, 0.75]
    assert rates(score([silent, scheduled])) == [0.5, 0.75], "none is logged"
    assert rates(score(iter([silent, logged]))) == [0.5, 0.25]
    with pytest.raises(
        ValueError, match=r"checkpoint 0 has one and checkpoints 1, 2 have none"
    ) as c:
        score([logged, bare, {"model": STATE}])
    assert str(tmp_path / "d") in str(c.value)
    assert rates(score([bare, bare])) == [None, None], "1 for all"
    assert rates(score([silent, bare])) == [None, None], "as without the files beside"


def test_a_lone_end_of_a_schedule_beside_the_weights_is_no_rate(tmp_path: Path) -> None:
    """What was right without looking at the files beside stays right: any rate ranks alike."""
    end = trainer(tmp_path / "a", 6, [], optimizer=stepped(0.0))
    assert rates(score([end])) == [None]
    middle = trainer(tmp_path / "b", 3, [], optimizer=stepped(0.5))
    with pytest.warns(UserWarning, match="checkpoint 1 .* has learning rate 0"):
        assert rates(score([middle, end])) == [0.5, 0.0]


def test_a_head_file_has_the_rate_of_the_head(tmp_path: Path) -> None:
    head = {"weight": torch.ones(3, 8), "bias": torch.ones(3)}
    torch.save({"model": head, "optimizer": stepped(1e-4, 0.5)}, tmp_path / "h.pt")
    assert read_head(str(tmp_path / "h.pt")).lr == 0.5
    torch.save({"model": head, "optimizer": stepped(1e-4, 0.5, momentum=0.0)}, tmp_path / "h.pt")
    found = read_head(str(tmp_path / "h.pt"))
    with pytest.raises(ValueError, match="or --lr on the command line"):
        _ = found.lr


def test_no_warning_where_all_is_known() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score([Checkpoint(STATE, lr=0.1), Checkpoint(state_of(network(2)), lr=0.2)])


@pytest.mark.parametrize("where", ["lr", "learning_rate", "groups", "schedule"])
def test_a_rate_of_the_file_is_not_looked_at_where_one_is_given(tmp_path: Path, where: str) -> None:
    content: dict[str, Any] = {"model": STATE, where: "cosine"}
    if where == "groups":
        content = {"model": STATE, "optimizer": {"param_groups": [{"lr": "cosine", "params": []}]}}
    elif where == "schedule":
        content = {"model": STATE, "scheduler": {"_last_lr": ["cosine"]}}
    torch.save(content, tmp_path / "x.pt")
    for source in (content, tmp_path / "x.pt"):
        points = [Checkpoint(source, lr=0.25)]
        assert rates(score(points)) == rates(score(iter(points))) == [0.25]
        with pytest.raises(TypeError, match="must be a number >= 0, got 'cosine'"):
            score([source])
    assert load_state_dict(tmp_path / "x.pt").keys() == STATE.keys()


def test_damaged_files_beside_the_weights_do_not_matter_where_a_rate_is_given(
    tmp_path: Path,
) -> None:
    folder = trainer(tmp_path / "a", 6, [{"learning_rate": "x"}], optimizer=stepped(0.125))
    (folder / "optimizer.pt").write_bytes(b"damaged")
    loaded = read(Checkpoint(folder, lr=0.25))
    assert (loaded.lr, loaded.step) == (0.25, 6)
    assert rates(score([Checkpoint(folder, lr=0.25)])) == [0.25]
    with pytest.raises(ValueError, match=r"optimizer\.pt"):
        score([folder])


def phases(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of an optimiser and of a scheduler that holds others, inside their first phase."""
    optimizer = torch.optim.SGD(network().parameters(), lr=1.0)
    schedules = torch.optim.lr_scheduler
    parts = [
        schedules.LinearLR(optimizer, 0.25, 1.0, total_iters=3),
        schedules.CosineAnnealingLR(optimizer, T_max=7),
    ]
    if kind == "SequentialLR":
        whole: Any = schedules.SequentialLR(optimizer, parts, milestones=[3])
    else:
        whole = schedules.ChainedScheduler(parts)
    optimizer.step()
    whole.step()
    assert len({part["_last_lr"][0] for part in whole.state_dict()["_schedulers"]}) == 2
    return optimizer.state_dict(), whole.state_dict()


@pytest.mark.parametrize("kind", ["SequentialLR", "ChainedScheduler"])
def test_of_a_scheduler_that_holds_others_its_own_rate_counts(kind: str) -> None:
    optimizer, scheduler = phases(kind)
    right = optimizer["param_groups"][0]["lr"]
    for at in (
        {"scheduler": scheduler},
        {"lr_schedulers": [scheduler]},
        {"t": {"sched": scheduler}},
    ):
        assert rates(score([{"model": STATE, **at}])) == [pytest.approx(right)]
    two = {"lr_schedulers": [scheduler, {"_last_lr": [9.0]}]}
    with pytest.raises(ValueError, match="for several parameter groups"):
        score([{"model": STATE, **two}])
    # Without a rate of its own, those inside are what is known.
    inside = {"scheduler": {"_schedulers": [{"_last_lr": [0.5]}]}}
    assert rates(score([{"model": STATE, **inside}])) == [0.5]


@pytest.mark.parametrize("key", ["loss", "best", "_step"])
def test_a_tensor_beside_a_rate_does_not_hide_it(key: str) -> None:
    number = {key: torch.tensor(3.0)}
    optimizer = {**stepped(1e-4, 0.5), **number}
    scheduler = {"_last_lr": [0.5], **number}
    for at in (
        {"optimizer": optimizer},
        {"optimizers": [optimizer]},
        {"scheduler": scheduler},
        {"trainer": {"optimizer": stepped(0.5), **number}},
        {"trainer": {"lr_scheduler": scheduler, **number}},
    ):
        assert rates(score([{"model": STATE, **at}])) == [0.5], at.keys()


def test_what_states_a_rate_today_is_not_outvoted_by_what_lies_among_tensors() -> None:
    hidden = {"copy": {"decay": torch.tensor(0.9), "optimizer": stepped(9.0)}}
    assert rates(score([{"model": STATE, "optimizer": stepped(0.5), **hidden}])) == [0.5]


def test_the_very_name_comes_before_one_that_ends_alike() -> None:
    groups = {
        "param_groups": [
            {"lr": 0.1, "params": [0], "param_names": ["aux.3.weight"]},
            {"lr": 0.5, "params": [1], "param_names": ["3.weight"]},
        ]
    }
    scored = ScoredParameters({"3.weight": (3, 8)}, "the head", {(3, 8): 2})
    stated = read(Checkpoint({"model": STATE, "optimizer": groups})).stated
    assert stated.rate(scored) == 0.5
    other = ScoredParameters({"net.3.weight": (3, 8)}, "the head", {(3, 8): 2})
    assert stated.rate(other) == 0.5
    nested = ScoredParameters({"net.aux.3.weight": (3, 8)}, "the head", {(3, 8): 2})
    with pytest.raises(ValueError, match=r"learning rates 0\.1, 0\.5, and"):
        stated.rate(nested)


def test_a_stream_whose_checkpoints_differ_in_having_a_rate_says_that_first() -> None:
    ambiguous = {"model": STATE, "optimizer": stepped(1e-4, 1e-2, momentum=0.0)}
    with pytest.raises(ValueError, match="either all have a learning rate or none"):
        score(iter([{"model": STATE}, ambiguous]))
