"""Measures cases: check against float64 first, then interleaved times, then peak memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from . import facts
from .cases import COMPILED_CASES, Case
from .energy import gpu_energy_counter, joules_per_call
from .inputs import Inputs, Result, errors_of, exact, make_inputs
from .measure import ceilings, floor_seconds, interleaved, plan_rounds, quartiles, timed
from .memory import allocator_peak, peak_bytes_in_child
from .providers import Job, Provider, providers_for
from .providers.ours import OURS
from .providers.plain import NARROW

__all__ = ["NOISE_LIMIT", "Settings", "add_memory", "best_plain", "find_row", "measure_case"]

# Above this spread of its ratio a case is called noisy, and a difference between runs no finding.
NOISE_LIMIT = 0.15


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes
    ----------
    budget
        Seconds that the rounds of one provider may take together, but for ``least`` rounds (three
        where one call takes longer than this).
    patience
        Seconds of one call above which a provider gets no further round.
    memory_limit
        Seconds for one measurement of peak memory; 0 leaves memory out.
    all_memory
        Measure the memory of every provider; False: of ours, of the fastest plain PyTorch, of
        those that build per-sample gradients and of other libraries.
    registry
        Module that lists the providers; see :func:`.providers.registered`.
    """

    profile: str = "small"
    device: str = "cpu"
    least: int = 3
    most: int = 11
    budget: float = 0.3
    patience: float = 1.5
    memory_limit: float = 10.0
    all_memory: bool = False
    registry: str = "moso_fast.bench.providers"

    @classmethod
    def of_profile(cls, profile: str, **options: Any) -> Settings:
        """Return settings that bring the profile in under its time: three minutes for ``small``."""
        if profile == "full":
            options = {
                "least": 5,
                "most": 15,
                "budget": 1.0,
                "patience": 6.0,
                "memory_limit": 60.0,
                "all_memory": True,
                **options,
            }
        return cls(profile, **options)


@dataclass
class _Entry:
    provider: Provider
    job: Job | None = None
    errors: dict[str, float] = field(default_factory=dict)
    first: float = 0.0
    problem: str = ""
    times: dict[int, float] = field(default_factory=dict)
    peak: int | None = None
    joules: float | None = None


def measure_case(
    case: Case,
    settings: Settings,
    roof: dict[str, float] | None = None,
    tick: Callable[[str], None] = lambda _: None,
    providers: list[Provider] | None = None,
) -> dict[str, Any]:
    """Measure one case and return its record.

    Parameters
    ----------
    roof
        What :func:`.measure.ceilings` returned earlier in this run; None measures it here.
    tick
        Called with a caption before each stage.
    providers
        None takes all of the settings' registry that belong to the case.

    Returns
    -------
    dict
        Case, conditions, ceilings, ``rows`` (one a provider) and ``skipped``; what JSON can hold.
    """
    if providers is None:
        providers = providers_for(case, settings.registry)
    tick(f"{case.name}: float64")
    roof = ceilings(settings.device, case.dtype) if roof is None else roof
    rows = case.rows(settings.profile)
    inputs = make_inputs(case, rows, settings.device)
    truth = exact(case, inputs)
    entries, skipped = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own deprecations
        for provider in providers:
            why = (
                provider.missing()
                or provider.refuse(case, inputs)
                or _too_slow_to_set_up(provider, case, settings)
            )
            if why:
                skipped.append({"provider": provider.name, "why": why})
                continue
            tick(f"{case.name}: {provider.name}")
            entries.append(_check(provider, case, inputs, truth, settings))
        del truth
        gc.collect()
        _time(entries, case, settings, tick)
        if settings.device != "cpu":
            for entry in entries:
                if entry.times and entry.job is not None:
                    _on_gpu(entry, entry.job, settings.device)
    found = [_row(entry, case, rows) for entry in entries]
    floor = floor_seconds(case, rows, roof)
    record: dict[str, Any] = {
        "title": case.title,
        "kind": case.kind,
        "rows_scored": rows,
        "classes": case.classes,
        "dim": case.dim,
        "heads": case.heads,
        "dtype": str(case.dtype).removeprefix("torch."),
        "measured": facts.conditions(),
        "ceilings": roof,
        "floor_seconds": floor,
        "rows": found,
        "skipped": skipped,
    }
    _compare(record, entries)
    if settings.memory_limit and settings.device == "cpu":
        del entries, inputs
        gc.collect()
        add_memory(case, record, settings, tick)
    return record


def best_plain(record: dict[str, Any]) -> dict[str, Any] | None:
    """Row of the fastest plain PyTorch that computes all that ours does; None without one.

    Of those that build no per-sample gradient; for networks, where norms need one, of the others.
    """
    for family in ("plain", "autograd"):
        rows = [
            row
            for row in record["rows"]
            if row["family"] == family
            and row["seconds"]
            and "grad_sqnorm" in row["errors"]
            and row["provider"] != NARROW
        ]
        if rows:
            return min(rows, key=lambda row: row["seconds"])
    return None


def find_row(record: dict[str, Any], provider: str = OURS) -> dict[str, Any] | None:
    """Row of a provider that got a number, or None."""
    for row in record["rows"]:
        if row["provider"] == provider and row["seconds"]:
            return row
    return None


def _too_slow_to_set_up(provider: Provider, case: Case, settings: Settings) -> str | None:
    if settings.profile == "full" or not provider.compiles or case.name in COMPILED_CASES:
        return None
    return f"the small profile compiles only in {', '.join(COMPILED_CASES)}; --profile full has it"


def _check(
    provider: Provider, case: Case, inputs: Inputs, truth: Result, settings: Settings
) -> _Entry:
    """Set up, run twice (the first warms up), compare with float64."""
    entry = _Entry(provider)
    try:
        entry.job = provider.prepare(case, inputs)
        entry.first, result = timed(entry.job, settings.device)
        if entry.first < settings.patience:
            entry.first = timed(entry.job, settings.device)[0]
        entry.errors = errors_of(result, truth)
    except Exception as error:  # whatever a library raises is its result
        lines = str(error).splitlines() or [""]
        entry.problem = f"failed: {type(error).__name__}: {lines[0][:200]}"
        return entry
    worst = max(entry.errors.values(), key=lambda e: float("inf") if e != e else e)
    limit = provider.tolerance(case)
    if not worst <= limit:
        entry.problem = f"wrong: relative error {worst:.2g}, at most {limit:g} is right"
    return entry


def _time(
    entries: list[_Entry], case: Case, settings: Settings, tick: Callable[[str], None]
) -> None:
    right = [e for e in entries if not e.problem and e.job is not None]
    rounds = {}
    for entry in right:
        if entry.first >= settings.patience:
            entry.times = {0: entry.first}  # one call, the only one it gets
        else:
            least = settings.least if entry.first < settings.budget else min(3, settings.least)
            rounds[entry.provider.name] = plan_rounds(
                entry.first, settings.budget, least, settings.most
            )
    jobs = {e.provider.name: e.job for e in right if e.provider.name in rounds and e.job}
    times = interleaved(jobs, rounds, settings.device, lambda: tick(f"{case.name}: timing"))
    for entry in right:
        entry.times = times.get(entry.provider.name, entry.times)


def _on_gpu(entry: _Entry, job: Job, device: str) -> None:
    entry.peak = allocator_peak(job, device)
    counter = gpu_energy_counter(device)
    if counter is not None:
        entry.joules = joules_per_call(job, counter, partial(torch.cuda.synchronize, device))


def add_memory(
    case: Case,
    record: dict[str, Any],
    settings: Settings,
    tick: Callable[[str], None] = lambda _: None,
) -> None:
    """Measure the peak memory of those providers of a CPU record that got a number."""
    fastest = best_plain(record)
    for row in record["rows"]:
        named = row["provider"] == OURS or row["family"] in ("autograd", "peer")
        if row["seconds"] is None or not (settings.all_memory or named or row is fastest):
            continue
        tick(f"{case.name}: memory of {row['provider']}")
        row["peak_bytes"], row["no_peak"] = peak_bytes_in_child(
            case,
            record["rows_scored"],
            row["provider"],
            torch.get_num_threads(),
            settings.memory_limit,
            settings.registry,
        )


def _row(entry: _Entry, case: Case, rows: int) -> dict[str, Any]:
    provider = entry.provider
    row: dict[str, Any] = {
        "provider": provider.name,
        "family": provider.family,
        "seconds": None,
        "errors": entry.errors,
        "note": provider.note,
        "problem": entry.problem or None,
        "peak_bytes": entry.peak,
        "no_peak": None,
        "joules": entry.joules,
    }
    if entry.times:
        low, middle, high = quartiles(list(entry.times.values()))
        row.update(seconds=middle, quartiles=[low, high], rounds=len(entry.times))
        if case.flops_a_row:
            row["flops"] = rows * case.flops_a_row / middle
            row["read_bytes"] = 2 * rows * case.bytes_a_row / middle
    return row


def _compare(record: dict[str, Any], entries: list[_Entry]) -> None:
    """Add what relates rows to each other: ratios, shares of the floor, noise."""
    ours, plain = find_row(record), best_plain(record)
    for row in record["rows"]:
        if row["seconds"] is None:
            continue
        if record["floor_seconds"]:
            row["percent_of_floor"] = 100 * record["floor_seconds"] / row["seconds"]
        if ours:
            row["times_ours"] = row["seconds"] / ours["seconds"]
    record["best_plain"] = plain["provider"] if plain else None
    record["speedup"] = record["noise"] = None
    if ours and plain:
        record["speedup"] = plain["seconds"] / ours["seconds"]
        by_name = {e.provider.name: e.times for e in entries}
        mine, theirs = by_name[OURS], by_name[plain["provider"]]
        ratios = [theirs[r] / mine[r] for r in mine if r in theirs]
        if len(ratios) > 2:
            low, middle, high = quartiles(ratios)
            record["noise"] = (high - low) / middle
