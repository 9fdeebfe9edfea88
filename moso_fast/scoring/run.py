"""From a model, settings and one call to the table: which job there is, and what is made of it."""

from __future__ import annotations

import torch

from ..tables.table import ScoreTable
from .combine import combine_checkpoints
from .job import Job
from .last_layer import LastLayerJob
from .parts import with_scores
from .provenance import provenance
from .settings import Call, ScoredModel, Settings
from .whole_network import FullJob

JOBS: dict[str, type[Job]] = {"last_layer": LastLayerJob, "full": FullJob}


def make_job(model: ScoredModel, settings: Settings, call: Call) -> Job:
    """Return the job of a call, which has looked at the data but not run the model yet.

    Raises
    ------
    TypeError, ValueError
        Data, partition, weights or checkpoints that cannot be scored, as far as they show it.
    """
    return JOBS[settings.gradient](model, settings, call)


def score_model(model: ScoredModel, settings: Settings, call: Call) -> ScoreTable:
    """Score all samples at all checkpoints; see `MoSoScorer.score`, whose work this is."""
    # Results that an inference-mode caller can still use anywhere afterwards.
    with torch.inference_mode(False), torch.no_grad():
        job = make_job(model, settings, call)
        groups = job.run()
        job.warn_if_noise(groups)
        rates = job.checkpoints.rates
        return combine_checkpoints(
            [one for group in groups for one in with_scores(group, call.formula, job.ids)],
            lr=[1.0 if lr is None else lr for lr in rates],
            partition=job.ids,
            index=job.table_index(),
            provenance=provenance(
                {"gradient": settings.gradient, **job.describe()},
                groups,
                options=settings,
                precision=job.precision,
                samples=job.samples,
                partition=job.describe_partition(),
                rates=rates,
                checkpoints=job.checkpoints.described,
                formula=call.formula,
                combine=call.combine,
                num_steps=call.num_steps,
                seed=call.seed,
            ),
            combine=call.combine,
            num_steps=call.num_steps,
        )
