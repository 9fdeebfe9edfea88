"""Scoring as one operator of ``torch.library``, for whoever must see one, or without it.

Where somebody looks on, such as ``torch.compile``, a checked problem goes through the operator;
else straight to the engine, which saves the operator its own checks of the same input.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, choose
from . import engine
from .options import OPTION_NAMES, Options
from .problem import Problem, build_problem, compute_dtype

# Arguments of a call that are tensors, in the order of the operator.
TENSORS = ("features", "weight", "labels", "bias", "sample_weight", "cu_seqlens")

_EightTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def score(
    problem: Problem, backend: str, chunk_size: int | None, formula: str | None, scale: float
) -> tuple[_EightTensors, Tensor | None, str]:
    """Score a problem by the backend of that name, or by what "auto" chooses.

    Returns
    -------
    tuple
        Alignment, grad_sqnorm, loss, el2n, margin and entropy, (K, N) each, |G|^2 (K,) and the
        count; the scores, where the backend computed them with the rest; the name of the backend.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:  # else the operator chooses when it runs
        chosen = choose(problem, backend)[0]
        backend = chosen.name
    if compiling or _watched(problem):
        tensors = (getattr(problem, name) for name in TENSORS)
        options = (getattr(problem, name) for name in OPTION_NAMES)
        results = torch.ops.moso_fast.last_layer_stats(
            *tensors, *options, backend, chunk_size, formula
        )
        return results, None, backend
    return *_run(problem, chosen, chunk_size, formula, scale), backend


# What PyTorch notes for a thread while somebody there is handed every operation: modes such as
# fake tensors and tracing for export, and the transforms of torch.func.
_WATCHERS = (
    torch._C.DispatchKey.Python,
    torch._C.DispatchKey.PreDispatch,
    torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode,
)


def _watched(problem: Problem) -> bool:
    """Whether somebody is to see the operator: a mode, a transform, a tracer, a kind of tensor."""
    if torch.jit.is_tracing() or any(
        map(torch._C._dispatch_tls_is_dispatch_key_included, _WATCHERS)
    ):
        return True
    return not (
        _plain(problem.features)
        and _plain(problem.weight)
        and _plain(problem.labels)
        and (problem.bias is None or _plain(problem.bias))
        and (problem.sample_weight is None or _plain(problem.sample_weight))
        and (problem.cu_seqlens is None or _plain(problem.cu_seqlens))
    )


def _plain(tensor: Tensor) -> bool:
    """Whether the memory of a tensor holds its numbers: what others mean, an operator finds out.

    Subclasses may do anything with an operation, meta tensors have no memory, and in that of
    ``z.conj().imag`` every number still has the wrong sign.
    """
    return type(tensor) is Tensor and not (tensor.is_meta or tensor.is_neg())


def _run(
    problem: Problem, backend: Backend, chunk_size: int | None, formula: str | None, scale: float
) -> tuple[_EightTensors, Tensor | None]:
    """Score a problem; results (K, N) in the order of :func:`score`."""
    found = engine.run(problem, backend, chunk_size, formula, scale)
    results = (
        found.alignment,
        found.grad_sqnorm,
        found.loss,
        found.el2n,
        found.margin,
        found.entropy,
        found.mean_grad_sqnorm,
        found.count,
    )
    return results, found.score


def _last_layer_stats_op(*arguments: Any) -> _EightTensors:
    """Do what :func:`score` does for whoever calls the operator, on what was checked."""
    options, (backend, chunk_size, formula) = arguments[len(TENSORS) : -3], arguments[-3:]
    tensors = dict(zip(TENSORS, arguments, strict=False))
    # Nothing is copied: the tensors have their dtypes already. Code that was compiled for others
    # may bring any, hence the checks.
    problem = build_problem(
        **tensors, options=Options(**dict(zip(OPTION_NAMES, options, strict=True)))
    )
    return _run(problem, choose(problem, backend)[0], chunk_size, formula, 1.0)[0]


def _last_layer_stats_fake(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    samples = features.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, dtype = weight.shape[0], compute_dtype(features)
    return (
        *(weight.new_empty((heads, samples), dtype=dtype) for _ in range(6)),
        weight.new_empty(heads, dtype=torch.float64),
        weight.new_empty((), dtype=torch.int64),
    )


def _schema() -> str:
    """Arguments and results of the operator: tensors as `build_problem` has made them, options."""
    optional = ("bias", "sample_weight", "cu_seqlens")
    tensors = (f"Tensor{'?' if name in optional else ''} {name}" for name in TENSORS)
    types = {"str | None": "str?"}
    options = (
        f"{types.get(str(field.type), field.type)} {field.name}" for field in fields(Options)
    )
    others = ("str backend", "int? chunk_size", "str? formula")
    results = ", ".join(["Tensor"] * 8)
    return f"({', '.join([*tensors, *options, *others])}) -> ({results})"


# The low-level registration: custom_op would import the compiler (a second) at the first call.
_LIBRARY = torch.library.Library("moso_fast", "DEF")
_LIBRARY.define("last_layer_stats" + _schema(), tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("last_layer_stats", _last_layer_stats_op, "CompositeExplicitAutograd")
torch.library.register_fake("moso_fast::last_layer_stats", _last_layer_stats_fake, lib=_LIBRARY)
