"""MoSoScorer: from a model, a loader and checkpoints to one table of scores."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .scoring.run import score_model
from .scoring.settings import Call, ScoredModel, Settings
from .tables.table import ScoreTable

__all__ = ["MoSoScorer"]


class MoSoScorer:
    """Scores every sample of a data set by the gradients of a network, or of its last layer.

    Last layer: one forward pass over the data per checkpoint, or one in all where only the head
    differs. Whole network: a forward and backward pass of whole batches, and one in forward mode,
    for every checkpoint. Both in eval mode (running statistics). The model is left as it was: its
    weights are exchanged by reference and put back, also after an exception, and so are the
    training modes of its modules.

    A head must be called once in a forward pass, on (B, D) features, or on (B, T, D) token features
    with labels (B, T): then a sequence is one sample.

    Parameters
    ----------
    model
        The network.
    head
        Name or module of the last `nn.Linear` or 1 x 1 convolution; None finds it (see
        `sources.find_head`). The loss is taken of the model's logits: its head's output, some or
        all rows of it in any order, their mean over positions, or a known map of it (a factor, a
        soft cap, softmax, BatchNorm in eval mode, ...; see `core.logit_map`). The first batch of
        every checkpoint shows which; anything else is refused. Gradients are by the weight and
        bias in force: of a computed weight (weight_norm, pruning), by what was computed, and of a
        weight tied to an embedding, by the head's own use of it. The table says so.
    gradient
        ``"last_layer"``, or ``"full"``: all parameters in ``scope``, as in the paper. Then the loss
        is taken of the model's output: logits (N, C) or (N, T, C), also as ``logits`` of a
        structure; ``head``, ``precision``, ``backend`` and ``feature_cache`` do not apply.
    scope
        With ``gradient="full"``: which parameters count, of those that require grad. None (all),
        names or patterns of parameters or modules, or a predicate ``(name, parameter) -> bool``.
    loss
        ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"mse"``; labels (N, C) for the last
        two, class ids or (N, C) probabilities for the first. With ``gradient="full"`` also a
        callable ``(outputs, labels) -> (N,)`` losses.
    views
        With ``gradient="full"``: readings of every sample of a data set with random augmentation,
        seeded; the loss of a sample is the mean over them. 1 takes one reading, and refuses data
        that differ from the first pass to the second.
    autocast
        With ``gradient="full"``: 16-bit dtype of `torch.autocast` for both passes; None leaves the
        caller's setting.
    label_smoothing, ignore_index
        As in `torch.nn.functional.cross_entropy`.
    class_weight
        (C,) factors on the losses of the classes, as ``weight`` of
        `torch.nn.functional.cross_entropy`, for class ids without label smoothing and
        ``gradient="last_layer"``. The loss of the whole is the mean over the N samples, as
        ``reduction="mean"`` has it without weights; with weights that divides by their sum W
        instead of N, a common factor N / W of all losses (of a part): it multiplies every score by
        (N / W)^2 and leaves their order as it is.
    device, dtype
        Where and in which floating-point dtype the model runs while it is scored, and to which its
        inputs are brought; None = as they are.
    precision, backend, chunk_size, nonfinite
        As in `moso_scores`.
    feature_cache
        Dtype of the features (N, D), which are kept in memory: ``"auto"`` (that of the head's
        input where it is 16-bit or float64, else float32), ``"float32"`` or ``"bfloat16"``.
    shift_labels
        Whether token features at t go with the label at t + 1. ``"auto"``: as in the model's own
        loss, where its forward (or that of a network within it) takes ``labels`` and returns one;
        else for the causal language models of transformers by their names; else not, unless the
        labels are the very tokens that the model reads, which is refused: say which.
    per
        What the loss of a sequence of tokens is: ``"token"``, the mean over its counted tokens, as
        in the loss that language models are trained with, or ``"sample"``, the sum, whose scores
        are largely a measure of length. Where every sample is one row it says nothing.
    batch_size
        Samples a batch where a data set is given instead of a loader.
    columns
        Names of the entries of a dict batch that the model gets; None = those that its forward
        names (or all, where it takes any), and one notice of what is left out.
    progress
        Show progress on stderr when it is a terminal.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong type or value; a head that cannot be found.

    Notes
    -----
    Tan et al., "Data Pruning via Moving-one-Sample-out", NeurIPS 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        head: str | nn.Module | None = None,
        gradient: str = "last_layer",
        scope: Any = None,
        views: int = 1,
        autocast: torch.dtype | None = None,
        loss: Any = "cross_entropy",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_weight: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        backend: str = "auto",
        feature_cache: str = "auto",
        shift_labels: str | bool = "auto",
        per: str = "token",
        batch_size: int = 256,
        columns: Sequence[str] | None = None,
        chunk_size: int | None = None,
        nonfinite: str = "raise",
        progress: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.settings = Settings(
            gradient=gradient,
            scope=scope,
            views=views,
            autocast=autocast,
            loss=loss,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            class_weight=class_weight,
            device=device,
            dtype=dtype,
            precision=precision,
            backend=backend,
            feature_cache=feature_cache,
            shift_labels=shift_labels,
            per=per,
            batch_size=batch_size,
            columns=columns,
            chunk_size=chunk_size,
            nonfinite=nonfinite,
            progress=progress,
        )
        self._scored = ScoredModel.of(model, head, self.settings)

    @property
    def model(self) -> nn.Module:
        """The network that is scored."""
        return self._scored.network

    @property
    def head(self) -> nn.Module | None:
        """The last layer; None where the gradient is that of the whole network."""
        return self._scored.head

    @property
    def head_name(self) -> str:
        """Name of the last layer in the model; empty where there is no `head`."""
        return self._scored.head_name

    def score(
        self,
        data: Any,
        checkpoints: Iterable[Any] | None = None,
        *,
        formula: str = "moso",
        combine: str = "mean",
        num_steps: int | None = None,
        partition: Any = None,
        seed: int = 0,
        resume: str | os.PathLike[str] | None = None,
        index: Any = None,
        sample_weight: Any = None,
    ) -> ScoreTable:
        """Score all samples at all checkpoints.

        Parameters
        ----------
        data
            A loader that does not shuffle, or a data set, without random augmentation; or whole
            arrays, (inputs, labels) or (inputs, labels, index). Batches are (input, label),
            (input, label, index), (index, (input, label)) or dicts with the key ``labels`` or
            ``label``, of which the model gets what its forward names (see ``columns``). An index
            that the data bring, also as ``idx`` or ``index`` of a dict, is that of the table.
            Rows of packed documents (with ``position_ids`` that begin again, ``cu_seqlens`` or
            ``seq_idx``) hold one sample a document. An `IterableDataset` is read without workers
            unless its samples bring their index, and refused where it is seen to shuffle: its
            labels are compared from pass to pass.
        checkpoints
            `Checkpoint` objects, state dicts or paths, also from a generator (read one by one);
            None scores the model as it is, with learning rate 1. Where no checkpoint has a
            learning rate, 1 is used for all of them.
        formula
            One of `moso_fast.core.formulas.FORMULAS`.
        combine, num_steps
            ``"mean"`` (weighted by learning rate, times T / N with T = ``num_steps``) or
            ``"zscore"``.
        partition
            None, (N,) integer ids, or a number of parts I (see `partition.partition_ids`): each
            part is scored against its own mean gradient and needs two counted samples.
        seed
            Seed of the split for an integer ``partition``.
        resume
            Folder in which finished checkpoints are kept: the same call goes on there after it was
            killed and returns bitwise the same table (with ``gradient="full"`` on a GPU only up to
            rounding, since cuDNN and sums by row number keep no order there). Formula,
            ``combine``, learning rates and ``num_steps`` may change between calls, and checkpoints
            may be added at the end. Labels and weights are compared with those of the run that it
            belongs to, of the inputs up to 64 samples (none of a stream).
        index
            (N,) data-set indices for the table; None = those that the data bring, else 0..N-1.
        sample_weight
            (N,) factors on the losses of the samples, in the order of the data, as in
            `moso_scores` (N still counts samples); with ``gradient="last_layer"``.

        Returns
        -------
        ScoreTable
            In the order of the data.

        Raises
        ------
        TypeError, ValueError
            Bad arguments or data (before any forward pass where they show it), checkpoints that do
            not fit the model, a ``resume`` folder of a different run.
        """
        call = Call(
            data=data,
            checkpoints=checkpoints,
            formula=formula,
            combine=combine,
            num_steps=num_steps,
            partition=partition,
            seed=seed,
            resume=resume,
            index=index,
            sample_weight=sample_weight,
        )
        return score_model(self._scored, self.settings, call.checked(self.settings.gradient))
