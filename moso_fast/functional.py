"""The two functions most users need: tensors in, scores or statistics out.

They work under autocast (they compute in their own precision) and with inputs that require grad
(results never do). Where somebody looks on who must see one operation, such as ``torch.compile``,
they go through a ``torch.library`` operator; else straight to the engine, which saves the operator
its own checks of the same input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, choose
from .core import engine, formulas
from .core.memory import check_chunk_size, make_plan, residual_budget, rows_at_a_time
from .core.options import OPTION_NAMES, Options
from .core.precision import own_precision
from .core.problem import Problem, build_problem, compute_dtype
from .util.array_like import as_tensors


@dataclass(frozen=True)
class LastLayerStats:
    """What one sweep over the features yields for every sample; NaN where it does not count.

    Shapes are (N,), or (K, N) for a (K, C, D) weight; N counts sequences with ``cu_seqlens``.

    Attributes
    ----------
    alignment
        a_i = <g_i, G>, the dot product with the mean gradient.
    grad_sqnorm
        q_i = |g_i|^2.
    loss
        Loss times sample weight; summed over the tokens of a sequence.
    el2n
        |residual|: root of the sum of |r|^2 over the tokens of a sequence.
    margin
        z_y - max of the other logits; mean over tokens.
    entropy
        Entropy of the prediction in nats; mean over tokens.
    backend
        Name of the backend that computed it.
    """

    alignment: Tensor
    grad_sqnorm: Tensor
    loss: Tensor
    el2n: Tensor
    margin: Tensor
    entropy: Tensor
    backend: str
    _mean_grad_sqnorm: Tensor
    _count: Tensor
    _score: Tensor | None = None  # where they were computed with the rest, for moso_scores alone

    @property
    def mean_grad_sqnorm(self) -> Any:
        """|G|^2 as a float; a (K,) float64 tensor for K heads."""
        if self.alignment.dim() == 2:
            return self._mean_grad_sqnorm
        return float(self._mean_grad_sqnorm[0])

    @property
    def count(self) -> int:
        """N: samples that count."""
        return int(self._count)

    def scores(self, formula: str = "moso", scale: float = 1.0) -> Tensor:
        """Scores by one of :data:`moso_fast.core.formulas.FORMULAS`; high = informative = keep.

        Raises
        ------
        ValueError
            Unknown formula; a scale that is not finite; one counted sample where the formula
            divides by N - 1.
        """
        formulas.check_formula(formula)
        formulas.check_scale(scale)
        formulas.check_count(formula, self.count)
        return self._scores(formula, scale)

    def _scores(self, formula: str, scale: float) -> Tensor:
        return formulas.score(
            formula, self.alignment, self.grad_sqnorm, self._mean_grad_sqnorm, self._count, scale
        )


def moso_scores(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    formula: str = "moso",
    scale: float = 1.0,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    precision: str | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    nonfinite: str = "raise",
    per: str = "sample",
) -> Tensor:
    """MoSo score of every sample for one head (or K heads over the same features).

    Equals, for one head without a bias::

        r = (features @ weight.T).softmax(1) - F.one_hot(labels, C)     # (N, C)
        G = r.T @ features / N                                          # (C, D)
        a = ((r @ G) * features).sum(1); q = (r**2).sum(1) * (features**2).sum(1)
        scores = scale * (N * a - q) / (N - 1)

    Arrays, columns of pandas and lists are taken where tensors are meant, without a copy where
    their memory can be shared (Python's floats are float64).

    Parameters
    ----------
    features
        (N, D) inputs of the last layer; float32, float16, bfloat16 or float64; any strides. May
        lie in main memory while the heads are on a CUDA device: then chunks are sent there while
        it works on others, once if they fit, else once a pass; best page-locked.
    weight, bias
        (C, D) and (C,); or (K, C, D) and (K, C) for K heads.
    labels
        (N,) integer class ids, or (N, C) targets (probabilities for cross-entropy).
    formula
        ``"moso"`` (the paper), ``"one_step"``, ``"official"``, ``"official_exact"``,
        ``"alignment"``, ``"cosine"``; see :mod:`moso_fast.formulas`.
    scale
        Factor on the scores, such as the learning rate of the checkpoint.
    loss
        ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"mse"`` (targets (N, C) for the last
        two, summed over C).
    label_smoothing
        In [0, 1), as in ``torch.nn.functional.cross_entropy``.
    ignore_index
        Rows with this label give NaN and do not count.
    sample_weight
        (N,) factors on each row's loss, hence on its gradient; N still counts rows.
    cu_seqlens
        (B + 1,) int32 or int64 offsets: the rows between two offsets are the tokens of one
        sample, whose gradient is the sum over its counted tokens.
    precision
        ``"highest"`` (float32-accurate), ``"high"``, ``"medium"`` (bfloat16 operands), or None:
        ``"highest"`` for float32 and float64 features, ``"medium"`` for 16-bit ones.
    backend
        ``"auto"`` or a name from :func:`moso_fast.backends`.
    chunk_size
        Rows at a time; also makes memory independent of N (residuals are computed twice).
    nonfinite
        ``"raise"``: a row with a NaN or infinite feature is an error; ``"exclude"``: it gives NaN
        and does not count.
    per
        With ``cu_seqlens``: the loss of a sequence is the sum over its counted tokens
        (``"sample"``) or their mean (``"token"``), as language models are trained; scores of sums
        are largely a measure of length.

    Returns
    -------
    Tensor
        (N,) or (K, N), float32 (float64 for float64 features), without a graph.

    Raises
    ------
    TypeError, ValueError
        Input that cannot be scored, in one line; also one counted sample where the formula
        divides by N - 1.

    Notes
    -----
    Tan et al., "Data Pruning via Moving-one-Sample-out", NeurIPS 2023.
    """
    given = locals()
    formulas.check_formula(formula)
    formulas.check_scale(scale)
    stats = _stats(_checked(given), backend, chunk_size, formula, scale)
    return stats._scores(formula, scale) if stats._score is None else stats._score


def last_layer_stats(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    precision: str | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    nonfinite: str = "raise",
    per: str = "sample",
) -> LastLayerStats:
    """Alignment, squared gradient norm, loss, EL2N, margin and entropy from one sweep.

    Parameters and errors as in :func:`moso_scores`, which is ``.scores(formula, scale)`` of this.
    """
    return _stats(_checked(locals()), backend, chunk_size, None, 1.0)


def explain(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    formula: str = "moso",
    scale: float = 1.0,
    backend: str = "auto",
    chunk_size: int | None = None,
    **options: Any,
) -> str:
    """Say what a scoring call with these arguments would do, without running it.

    Parameters and errors as in :func:`moso_scores`, as far as shapes and dtypes show them.

    Returns
    -------
    str
        Backend and why, passes, chunks, memory beyond the inputs and results.
    """
    formulas.check_formula(formula)
    formulas.check_scale(scale)
    given = {"features": features, "weight": weight, "labels": labels, "bias": bias, **options}
    problem = _checked(given)
    chosen, reasons = choose(problem, backend)
    plan = make_plan(problem, chunk_size)
    passes = chosen.prepare(problem, plan)
    chunk_rows = rows_at_a_time(problem, plan, passes)
    chunks = -(-problem.rows // chunk_rows) if problem.rows else 0
    residuals = (
        f"kept between the passes ({plan.residual_bytes / 2**20:.1f} MiB)"
        if plan.keep_residual
        else "computed again in the second pass"
    )
    lines = [
        f"problem   N={problem.samples} rows={problem.rows} D={problem.dim} C={problem.classes} "
        f"K={problem.heads} {str(problem.features.dtype).removeprefix('torch.')} on "
        f"{problem.device}, loss={problem.loss}, precision={problem.precision}",
        f"backend   {chosen.name}",
        *(f"          {reason}" for reason in reasons),
        *(
            f"{'' if line else 'plan':<10}{text}"
            for line, text in enumerate(passes.explain(chunk_rows))
        ),
        f"passes    2 over the features, {chunks} chunk(s) of up to {chunk_rows} rows",
        # The plan may have been made without asking what is free.
        f"residuals {residuals}; budget {residual_budget(problem.device) / 2**20:.0f} MiB",
    ]
    if problem.streamed:
        row = problem.dim * problem.features.dtype.itemsize
        stay = min(problem.rows, plan.resident_bytes // row)
        if stay < problem.rows:
            stay -= stay % chunk_rows  # whole chunks stay
        lines.append(
            f"features  in main memory, sent in chunks; {stay} of {problem.rows} rows stay on "
            f"{problem.device} between the passes"
        )
    return "\n".join(lines)


# Arguments of a call that are tensors, in the order of the operator.
_TENSORS = ("features", "weight", "labels", "bias", "sample_weight", "cu_seqlens")
# Arguments that are neither tensors nor options: how it is run, and what is made of the results.
_OTHERS = ("backend", "chunk_size", "formula", "scale")


def _checked(given: Mapping[str, Any]) -> Problem:
    """Return the checked problem of a call's arguments, by their names."""
    for name in given:
        if name not in _TENSORS and name not in _OTHERS and name not in OPTION_NAMES:
            raise TypeError(f"unknown argument {name!r}")
    options = Options.among(given)
    tensors = as_tensors(**{name: given.get(name) for name in _TENSORS})
    return build_problem(**dict(zip(_TENSORS, tensors, strict=True)), options=options)


def _stats(
    problem: Problem, backend: str, chunk_size: int | None, formula: str | None, scale: float
) -> LastLayerStats:
    """Score a checked problem; with a formula also its scores, where the backend has them."""
    check_chunk_size(chunk_size)
    compiling = torch.compiler.is_compiling()
    if not compiling:  # else the operator chooses when it runs
        chosen = choose(problem, backend)[0]
        backend = chosen.name
    score = None
    if compiling or _watched(problem):
        tensors = (getattr(problem, name) for name in _TENSORS)
        options = (getattr(problem, name) for name in OPTION_NAMES)
        results = torch.ops.moso_fast.last_layer_stats(
            *tensors, *options, backend, chunk_size, formula
        )
    else:
        results, score = _run(problem, chosen, chunk_size, formula, scale)
    *by_sample, mean_grad_sqnorm, count = results
    if not problem.stacked:
        by_sample = [values[0] for values in by_sample]
        score = None if score is None else score[0]
    alignment, grad_sqnorm, loss, el2n, margin, entropy = by_sample
    return LastLayerStats(
        alignment,
        grad_sqnorm,
        loss,
        el2n,
        margin,
        entropy,
        backend,
        mean_grad_sqnorm,
        count,
        score,
    )


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


_EightTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _run(
    problem: Problem, backend: Backend, chunk_size: int | None, formula: str | None, scale: float
) -> tuple[_EightTensors, Tensor | None]:
    """Score a problem; results (K, N) in the order of :class:`LastLayerStats`."""
    with own_precision(problem):
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
    """Do what ``_stats`` does for whoever calls the operator, on what it has checked."""
    options, (backend, chunk_size, formula) = arguments[len(_TENSORS) : -3], arguments[-3:]
    tensors = dict(zip(_TENSORS, arguments, strict=False))
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
    tensors = (f"Tensor{'?' if name in optional else ''} {name}" for name in _TENSORS)
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
