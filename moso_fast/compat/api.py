"""The authors' scoring functions, with their signatures and numbers, in a fraction of the time.

``MoSo_scoring`` and ``MoSo_scoring_exact`` of the published scoring.py take a loader of batch size
1 and two backward passes a sample. These take any batch size and any device, and compute whole
batches. ``python -m moso_fast.compat`` stands in for the script itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..core.formulas import score as formula_score
from ..full.batches import Batch
from ..full.engine import FullGradient, choose_parameters, only_these_require_grad
from ..full.loss import OutputLoss
from ..full.passes import Network
from ..scoring.eval_mode import evaluating
from ..sources.data.batch_parts import parts_of
from ..sources.data.batches import SampleBatches, make_loader, split_batch
from ..sources.find_head import unwrapped

__all__ = ["MoSo_scoring", "MoSo_scoring_exact"]

# Samples that are gathered from small batches before they are run.
_GATHERED = 64


def MoSo_scoring(
    net: nn.Module,
    dataloader: Iterable[Any],
    criterion: Callable[[Tensor, Tensor], Tensor],
    lr: Any = None,
) -> Tensor:
    """Score every sample as the authors' ``MoSo_scoring`` does: <G - g / N, g>.

    Parameters
    ----------
    net
        The network; it is scored in eval mode, over all parameters that require grad, and left as
        it was.
    dataloader
        (inputs, labels) batches of any size, the same in every pass.
    criterion
        Such as `nn.CrossEntropyLoss`; taken of each sample as of a batch of one.
    lr
        Not used, as in the original.

    Returns
    -------
    Tensor
        (N,) float32 on the CPU, in the order of the loader; float64 for a float64 network.

    Raises
    ------
    TypeError, ValueError
        A loader that shuffles or changes from pass to pass, labels outside the classes, a loss
        that is not finite.
    """
    return _score(net, dataloader, criterion, "official")


def MoSo_scoring_exact(
    net: nn.Module,
    dataloader: Iterable[Any],
    criterion: Callable[[Tensor, Tensor], Tensor],
    lr: Any = None,
) -> Tensor:
    """Score every sample as the authors' ``MoSo_scoring_exact`` does, which their script calls.

    [(2N - 3) |G|^2 - |g|^2 + (2N - 4) <G - g / N, g>] / (N - 1)^2; despite its name not the exact
    value of leaving a sample out (`formula="one_step"` is, for one step). Arguments, result and
    errors as in `MoSo_scoring`; two samples are the least.
    """
    return _score(net, dataloader, criterion, "official_exact")


def _score(net: nn.Module, loader: Iterable[Any], criterion: Any, formula: str) -> Tensor:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be an nn.Module, got {type(net).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    if isinstance(loader, DataLoader):
        # Refuses one that shuffles, and reads a stream that workers would repeat without them.
        batches = SampleBatches(make_loader(loader, 1))
        if batches.indexed:
            # Samples with their numbers may come in any order, and the numbers have no place here.
            raise _takes_no_index()
        loader = batches.loader
    elif isinstance(loader, Iterator):
        raise TypeError("dataloader must be one that can be gone through twice, got an iterator")
    parameters = choose_parameters(net)
    device = next(iter(parameters.values())).device
    network = Network(unwrapped(net), _loss_of(criterion), parameters, device)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        evaluating(net),
        only_these_require_grad(net, parameters.values()),
    ):
        engine = FullGradient(network)
        result = engine.part(lambda: _gathered(loader), on_count=lambda n: _check(formula, n))
    return formula_score(
        formula,
        result.fields["alignment"],
        result.fields["grad_sqnorm"],
        torch.tensor([result.mean_grad_sqnorm], dtype=torch.float64, device="cpu"),
        torch.tensor(result.count, device="cpu"),
    )


def _takes_no_index() -> ValueError:
    return ValueError("dataloader: batches must be (inputs, labels); MoSoScorer takes an index")


def _check(formula: str, count: int) -> None:
    if formula == "official_exact" and count < 2:
        raise ValueError(f"dataloader must hold at least 2 samples, got {count}")


def _gathered(loader: Iterable[Any]) -> Iterator[Batch]:
    """Batches of the loader, small ones of equal shapes joined."""
    waiting: list[tuple[Tensor, Tensor]] = []
    start = 0

    def joined() -> Iterator[Batch]:
        nonlocal start
        if waiting:
            labels = torch.cat([y for _, y in waiting])
            index = torch.arange(start, start + len(labels), device="cpu")
            start += len(labels)
            yield Batch((torch.cat([x for x, _ in waiting]),), {}, labels, index)
            waiting.clear()

    for batch in loader:
        if parts_of(batch)[2] is not None:
            raise _takes_no_index()
        args, kwargs, labels = split_batch(batch)
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            yield from joined()
            index = torch.arange(start, start + len(labels), device="cpu")
            start += len(labels)
            yield Batch(args, kwargs, labels, index)
            continue
        x = args[0]
        if waiting and waiting[0][0].shape[1:] != x.shape[1:]:
            yield from joined()
        waiting.append((x, labels))
        if sum(len(y) for _, y in waiting) >= _GATHERED:
            yield from joined()
    yield from joined()


def _loss_of(criterion: Any) -> OutputLoss:
    """Return the criterion of single samples, as it is for a batch of one."""
    plain = type(criterion) is nn.CrossEntropyLoss and criterion.weight is None
    if plain and criterion.reduction in ("mean", "sum"):
        return OutputLoss("cross_entropy", criterion.label_smoothing, criterion.ignore_index)
    if isinstance(criterion, nn.Module):
        criterion = copy.deepcopy(criterion)

    def each(outputs: Any, labels: Tensor) -> Tensor:
        values = [
            criterion(outputs[k : k + 1], labels[k : k + 1]).reshape(()) for k in range(len(labels))
        ]
        return torch.stack(values)

    return OutputLoss(each)
