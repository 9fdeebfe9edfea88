"""The learning rates of all checkpoints of one call: all known, or none, and not all 0."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from .rates import ScoredParameters, Stated

_SHOWN = 6


def settle(
    stated: Sequence[Stated],
    scored: ScoredParameters | Sequence[ScoredParameters | None],
    combine: str,
    option: str = "",
) -> list[float | None]:
    """Return the learning rate of each checkpoint: a number for all of them, or None for all.

    ``scored``: whose rate is wanted, the same for all checkpoints or one for each;
    ``option``: how to give a rate, where that is no argument of `Checkpoint`. A checkpoint that
    states none takes that of the optimiser or scheduler saved beside it. Warns of checkpoints that
    count nothing.

    Raises
    ------
    ValueError
        Some checkpoints have a rate and others have none; all rates are 0; several rates are
        stated and it cannot be told which one belongs to the parameters that are scored.
    """
    if isinstance(scored, ScoredParameters):
        scored = [scored] * len(stated)
    # Standardised scores do not depend on the rates: nothing about them is worth refusing.
    if combine == "zscore":
        try:
            rates = _complete(stated, scored, option)
        except ValueError as error:
            warnings.warn(
                f"{error} (combine='zscore' needs none; self_influence is taken with rate 1)",
                stacklevel=2,
            )
            return [None] * len(stated)
    else:
        rates = _complete(stated, scored, option)
    check_rates(rates, [one.where for one in stated], combine, option)
    return rates


def _complete(
    stated: Sequence[Stated], scored: Sequence[ScoredParameters | None], option: str
) -> list[float | None]:
    rates = [one.rate(whose) for one, whose in zip(stated, scored, strict=True)]
    if None not in rates:
        return rates
    filled = [
        one.later.rate(whose) if rate is None and one.later is not None else rate
        for one, whose, rate in zip(stated, scored, rates, strict=True)
    ]
    none_stated = all(rate is None for rate in rates)
    # A rate of 0 beside the weights (the schedule's end) says less than no rate where no other
    # checkpoint has one: the ranking is the same under every rate but 0.
    if none_stated and (None in filled or not any(filled)):
        return rates
    names = {k: one.where for k, one in enumerate(stated)}
    check_presence(dict(enumerate(filled)), names, option)
    return filled


def check_presence(
    rates: Mapping[int, float | None], where: Mapping[int, str], option: str = ""
) -> None:
    """Raise ValueError where some of the checkpoints (number -> rate) have one and others none.

    ``where`` names each of them, ``option`` how to give a rate.
    """
    with_rate = [k for k, rate in rates.items() if rate is not None]
    without = [k for k, rate in rates.items() if rate is None]
    if with_rate and without:
        numbers = ", ".join(str(k) for k in without[:_SHOWN])
        names = ", ".join(dict.fromkeys(where[k] for k in without[:_SHOWN]))
        more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
        if option:
            others = f"{names}{more} {'does' if len(without) == 1 else 'do'}"
            raise ValueError(
                f"{where[with_rate[0]]} states a learning rate and {others} not: either all have "
                f"one or none; give one {option} for each"
            )
        lacking = f"checkpoint {numbers} has none"
        if len(without) > 1:
            lacking = f"checkpoints {numbers}{more} have none"
        raise ValueError(
            "checkpoints: either all have a learning rate or none, but checkpoint "
            f"{with_rate[0]} has one and {lacking}; give Checkpoint(source, lr=...) for each "
            f"(without: {names}{more})"
        )


def check_rates(
    rates: Sequence[float | None], where: Sequence[str], combine: str, option: str = ""
) -> None:
    """Refuse learning rates that are all 0, and warn of single ones that are.

    ``where`` names the checkpoints, ``option`` how to give another rate.
    """
    option = option or "Checkpoint(source, lr=...)"
    zero = [k for k, rate in enumerate(rates) if rate == 0]
    if not zero:
        return
    why = (
        "a schedule that ends at 0 leaves this in its last checkpoint, since what is saved is the "
        "rate of the next step"
    )
    if len(zero) == len(rates):
        if combine != "mean":
            warnings.warn(
                f"learning rates are all 0 ({why}): self_influence is 0; {option} gives others",
                stacklevel=2,
            )
            return
        raise ValueError(
            f"learning rates are all 0, which would make every score 0: {why}; give the rate of "
            f"the last step that was taken with {option}, or any positive one for a single "
            "checkpoint, whose ranking does not depend on it"
        )
    if combine == "mean":
        names = ", ".join(f"{k} ({where[k]})" for k in zero[:_SHOWN])
        one = len(zero) == 1
        which = f"checkpoint {names} has" if one else f"checkpoints {names} have"
        warnings.warn(
            f"{which} learning rate 0 and {'counts' if one else 'count'} nothing in the scores: "
            f"{why}; {option} gives another",
            stacklevel=2,
        )
