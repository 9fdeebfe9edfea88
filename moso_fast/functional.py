"""The two functions most users need: tensors in, scores or statistics out.

They work under autocast (they compute in their own precision) and with inputs that require grad
(results never do), and under ``torch.compile`` (see ``core/operator.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .backends import choose
from .core import formulas, operator
from .core.memory import check_chunk_size, make_plan, residual_budget, rows_at_a_time
from .core.operator import TENSORS
from .core.options import Options
from .core.problem import Problem, build_problem
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
    formulas.check_formula(formula)
    formulas.check_scale(scale)
    options = Options(
        loss=loss,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        precision=precision,
        nonfinite=nonfinite,
        per=per,
    )
    problem = _checked(features, weight, labels, bias, sample_weight, cu_seqlens, options)
    check_chunk_size(chunk_size)
    results, score, _ = operator.score(problem, backend, chunk_size, formula, scale)
    if score is None:
        alignment, grad_sqnorm, *_, mean_grad_sqnorm, count = results
        score = formulas.score(formula, alignment, grad_sqnorm, mean_grad_sqnorm, count, scale)
    return score if problem.stacked else score[0]


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
    options = Options(
        loss=loss,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        precision=precision,
        nonfinite=nonfinite,
        per=per,
    )
    problem = _checked(features, weight, labels, bias, sample_weight, cu_seqlens, options)
    check_chunk_size(chunk_size)
    results, _, backend = operator.score(problem, backend, chunk_size, None, 1.0)
    *by_sample, mean_grad_sqnorm, count = results
    if not problem.stacked:
        by_sample = [values[0] for values in by_sample]
    alignment, grad_sqnorm, loss_values, el2n, margin, entropy = by_sample
    return LastLayerStats(
        alignment,
        grad_sqnorm,
        loss_values,
        el2n,
        margin,
        entropy,
        backend,
        mean_grad_sqnorm,
        count,
    )


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
    more = {name: options.pop(name, None) for name in ("sample_weight", "cu_seqlens")}
    problem = _checked(features, weight, labels, bias, **more, options=Options(**options))
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


def _checked(
    features: Any,
    weight: Any,
    labels: Any,
    bias: Any,
    sample_weight: Any,
    cu_seqlens: Any,
    options: Options,
) -> Problem:
    """Return the checked problem of a call, whose tensors may still be arrays or lists."""
    given = (features, weight, labels, bias, sample_weight, cu_seqlens)
    tensors = as_tensors(**dict(zip(TENSORS, given, strict=True)))
    return build_problem(**dict(zip(TENSORS, tensors, strict=True)), options=options)
