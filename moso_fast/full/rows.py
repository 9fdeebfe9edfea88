"""What the rows of a batch are to a model: apart or not, alone or in pairs, flat or not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .batches import Batch
from .flat import (
    ASK,
    Flat,
    LookUp,
    find_flat,
    looked_up,
    looked_up_alone,
    may_be_flat,
    same_twice,
)
from .passes import Network

# Allowed relative difference to plain autograd; beyond it, the rule itself must be wrong.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
_ROUGH_TOLERANCE = 0.1


def tolerance(network: Network) -> float:
    """Return the allowed relative difference of two ways to the same gradient or loss."""
    if network.autocast is not None:
        return _ROUGH_TOLERANCE
    return _TOLERANCE.get(network.parameters[0].dtype, _ROUGH_TOLERANCE)


class Rows:
    """How the rows of a batch go through one network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        #: Flat inputs of every batch; None = not known yet.
        self.flat: tuple[Flat, ...] | None = None

    def know_batch(self, batch: Batch) -> Batch:
        """Note in a batch which of its inputs are flat, as the model's first batch showed."""
        if self.flat is None:
            inputs = batch.inputs()
            if batch.rows == 1:
                if may_be_flat(inputs) and not batch.flat:
                    self.know_pairs(batch)
                    return self._alone(batch) if self.network.pairs else batch
                return batch
            self.flat = ()
            if may_be_flat(inputs):
                with self.network.context():
                    calls = looked_up(lambda: self.network.forward(batch))
                self.flat = find_flat(calls, inputs, batch.rows)
        return replace(batch, flat=self.flat) if self.flat else batch

    def _alone(self, batch: Batch) -> Batch:
        """Note the flat inputs of a row that goes through the model twice, in a batch of its own.

        Where no larger batch has shown them yet. A row's own numbers may look like offsets or
        lengths, so that each such batch is asked anew, and tried.

        Raises
        ------
        ValueError
            The two rows do not get the same bags.
        """
        network = self.network

        def calls(given: Batch) -> list[LookUp]:
            with network.context():
                return looked_up_alone(lambda: network.model(*given.args, **given.kwargs))

        inputs, once = batch.inputs(), calls(batch)

        def works(given: Batch) -> bool:
            return same_twice(once, calls(network.enough(given)), inputs)

        if works(batch):
            return batch
        flat = replace(batch, flat=find_flat(once, inputs, 1))
        if works(flat):
            return flat
        raise ValueError(
            "model: it fails in a batch of one, and its embedding bags do not tell how a row can "
            f"go through it twice instead; {ASK}, in batches of at least two"
        )

    def know_pairs(self, batch: Batch) -> None:
        """Find out whether the model fails in a batch of one, where it takes the same row twice.

        Raises
        ------
        Exception
            What the model or the loss raises for one row, if they also do for two.
        """
        network, alone = self.network, batch.take(slice(0, 1))
        if network.pairs is not None or alone.rows > 1:
            return
        network.pairs = False
        try:
            self.losses(alone)
        except Exception as error:
            network.pairs = True
            try:
                if self.flat is None and may_be_flat(alone.inputs()):
                    alone = self._alone(alone)
                self.losses(alone)
            except Exception:  # no matter of the batch's size
                network.pairs = None
                raise error from None

    def losses(self, batch: Batch) -> Tensor:
        """Losses of the rows, without a gradient; labels that no class has are refused."""
        network = self.network
        with torch.no_grad(), network.context():
            outputs = network.forward(batch)
            network.loss.check(outputs, batch.labels, batch.index, batch.views)
            return network.losses(outputs, batch).loss

    def check_independence(self, few: Batch, ends: tuple[Batch, Batch], settled: bool) -> None:
        """Compare the losses of the first and the last sample alone with those among others.

        A model that gives other losses in a batch of one gets rows in pairs, unless it is
        ``settled`` how it is run.

        Raises
        ------
        ValueError
            The samples of a batch influence each other.
        """
        together = self.losses(few)
        scale = together.abs().max().clamp_min(1e-3)

        def differs(mine: Tensor, alone: Tensor) -> bool:
            return bool(((mine - alone).abs() > max(tolerance(self.network), 1e-3) * scale).any())

        first, last = ends
        for one, mine in ((first, together[: first.rows]), (last, together[-last.rows :])):
            alone = self.losses(one)
            known = settled or self.network.pairs
            if differs(mine, alone) and one.rows == 1 and not known:
                # Values of its own in a batch of one, by a ``.squeeze()`` for example.
                self.network.pairs = True
                twice = self.losses(one)
                if not differs(mine, twice):
                    continue
                self.network.pairs = False
            if differs(mine, alone):
                raise ValueError(
                    "model: the loss of a sample changes with the other samples of its batch "
                    f"({float(alone[0]):.6g} in a batch of one, {float(mine[0]):.6g} among "
                    f"{few.samples}); "
                    "gradients of single samples are not defined"
                )
