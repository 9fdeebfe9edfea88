"""Opacus, dattri and kronfluence, each asked for <g_i, mean gradient> of the last layer.

Imports stand inside the adapters: none of them is a dependency.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from moso_fast.bench.cases import Case
from moso_fast.bench.inputs import Inputs
from moso_fast.bench.providers import Job, Provider

from .captum import head_module

__all__ = ["PROVIDERS"]

_BATCH = 256
_MEAN_GRADIENT_QUERY = "mean_gradient"


def _opacus(case: Case, inputs: Inputs) -> Job:
    """``GradSampleModule``: every per-sample gradient at once, the rest by einsum."""
    from opacus import GradSampleModule

    # Its hooks are silent in eval mode; a lone linear layer behaves the same in both.
    module = GradSampleModule(head_module(inputs)[1].train(), loss_reduction="sum")

    def run() -> dict[str, Tensor]:
        module.zero_grad()
        losses = F.cross_entropy(module(inputs.features), inputs.labels, reduction="none")
        losses.sum().backward()
        weight, bias = (p.grad_sample for p in module.parameters())
        alignment = torch.einsum("ncd,cd->n", weight, weight.mean(0)) + bias @ bias.mean(0)
        norms = weight.flatten(1).square().sum(1) + bias.square().sum(1)
        return {"loss": losses.detach(), "alignment": alignment, "grad_sqnorm": norms}

    return run


class _Whole(Dataset[tuple[Tensor, Tensor]]):
    """A data set of one element, which is all samples together."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.tensors


def _dattri(case: Case, inputs: Inputs) -> Job:
    """``TracInAttributor`` with the mean loss of all samples as its one query."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    model = head_module(inputs)

    def loss(params: Any, data: Any) -> Tensor:
        features, label = data
        logits = torch.func.functional_call(model, params, features[None])
        return F.cross_entropy(logits, label[None])

    def mean_loss(params: Any, data: Any) -> Tensor:
        features, labels = data
        return F.cross_entropy(torch.func.functional_call(model, params, features), labels)

    task = AttributionTask(loss, model, model.state_dict(), target_func=mean_loss)
    attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False)
    # None as an argument means "512 random projections"; only this switches them off.
    attributor.projector_kwargs = None
    train = DataLoader(TensorDataset(inputs.features, inputs.labels), batch_size=_BATCH)
    query = DataLoader(_Whole(inputs.features, inputs.labels), batch_size=1)

    def run() -> dict[str, Tensor]:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            return {"alignment": attributor.attribute(train, query)[:, 0]}

    return run


def _kronfluence(case: Case, inputs: Inputs) -> Job:
    """Identity factors and an aggregated query: exact, without per-sample gradients."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Head(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    logging.getLogger("kronfluence").setLevel(logging.ERROR)
    task = Head()
    model = prepare_model(copy.deepcopy(head_module(inputs)), task)
    folder = tempfile.TemporaryDirectory(prefix="moso_fast_kronfluence_")
    analyzer = Analyzer(
        "bench",
        model,
        task,
        cpu=inputs.features.device.type == "cpu",
        output_dir=folder.name,
        disable_tqdm=True,
        disable_model_save=True,
    )
    data = TensorDataset(inputs.features, inputs.labels)
    analyzer.fit_all_factors(
        "identity", data, factor_args=FactorArguments(strategy="identity"),
        per_device_batch_size=_BATCH,
    )  # fmt: skip

    def run() -> dict[str, Tensor]:
        analyzer.compute_pairwise_scores(
            _MEAN_GRADIENT_QUERY,
            "identity",
            data,
            data,
            per_device_query_batch_size=_BATCH,
            per_device_train_batch_size=_BATCH,
            score_args=ScoreArguments(aggregate_query_gradients=True),
            overwrite_output_dir=True,
        )
        scores = analyzer.load_pairwise_scores(_MEAN_GRADIENT_QUERY)["all_modules"]
        return {"alignment": scores.flatten() / len(inputs.labels)}

    assert Path(folder.name).is_dir()
    run.folder = folder  # type: ignore[attr-defined]  # lives as long as the job
    return run


def _provider(name: str, prepare: Any, needs: tuple[str, ...], note: str) -> Provider:
    kinds = frozenset({"head"})
    return Provider(name, "peer", kinds, prepare, needs=needs, heavy=True, note=note)


PROVIDERS = (
    _provider("Opacus GradSampleModule", _opacus, ("opacus",), "all per-sample gradients"),
    _provider("dattri TracIn, no projection", _dattri, ("dattri",), "alignment only"),
    _provider(
        "kronfluence, identity factors", _kronfluence, ("kronfluence",),
        "alignment only; through files",
    ),
)  # fmt: skip
