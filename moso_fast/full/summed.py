"""The first pass over some samples: summed gradients, squared norms, losses and metrics."""

from __future__ import annotations

from torch import Tensor

from . import explicit
from .batches import Batch
from .methods import CHANGED_ORDER, Methods
from .norms.tape import Tape, UnknownCall
from .passes import Network, NoOtherOrder, order_changes, traced


def summed(
    network: Network, methods: Methods, kept: Batch
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Return summed gradients of the parameters, and values of each sample: name -> (n,)."""
    plan, prepared = methods.plan, False
    while True:
        try:
            losses, gradients, tape = traced(network, plan, kept, methods.expanding, methods.moves)
            if not _order_changes(network, methods, kept, tape):
                break
        except UnknownCall as call:
            # Not seen on the first samples: the first batch of several, or another branch.
            if prepared:
                for key in call.used:
                    plan.others[key] = "used in a call that few samples make"
            methods.prepare(kept)
            prepared = True
    # Of a row that went through the model twice, the second has no part in the loss.
    norms = tape.total()[: kept.samples]
    if plan.others:
        methods.know_others(kept)
        norms += explicit.norms(methods.others, network, kept, list(plan.others))

    def mean(rows: Tensor) -> Tensor:
        return network.per_sample(rows, kept).double().cpu()

    values = {
        "grad_sqnorm": norms.cpu(),
        "loss": mean(losses.loss),
        "el2n": mean(losses.residual_sqnorm.sqrt()),
        "margin": mean(losses.margin),
        "entropy": mean(losses.entropy),
    }
    return gradients, values


def _order_changes(network: Network, methods: Methods, kept: Batch, tape: Tape) -> bool:
    """Tell whether the pass has to be made again, since samples may not lie as it takes them.

    Where the model may give samples another order, every batch is checked; parameters of calls in
    which they lie otherwise get explicit gradients from then on.
    """
    if not tape.moves or kept.samples == 1:
        return False
    if tape.marks is None:
        methods.moves = True
        return True
    plan = methods.plan
    try:
        wrong = order_changes(network, plan, kept, tape, methods.expanding, methods.tolerance)
    except NoOtherOrder:  # what cannot be checked is not relied on
        wrong = {key for _, _, used in tape.calls for key in used}
    for key in wrong:
        plan.others[key] = CHANGED_ORDER
    return bool(wrong)
