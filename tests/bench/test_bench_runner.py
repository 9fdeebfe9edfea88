"""What a case's record holds, to the last number: by providers whose seconds are given."""

from __future__ import annotations

import gc
import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from bench_cases import HEAD, NARROW_HEAD, ROOF, SEQUENCES

from moso_fast.bench import facts, runner
from moso_fast.bench.inputs import exact
from moso_fast.bench.providers import Provider
from moso_fast.bench.providers.ours import OURS
from moso_fast.bench.providers.plain import NARROW
from moso_fast.bench.runner import Settings, best_plain, find_row, measure_case

KINDS = frozenset({"head"})
STEADY = Settings(least=3, most=5, budget=1.0, patience=1.5, memory_limit=0.0)


@pytest.fixture
def made(clock, monkeypatch):
    """Return a maker of providers: exact results after the given seconds, call by call."""
    monkeypatch.setattr(facts, "conditions", lambda: {"date": "today"})
    monkeypatch.setattr(gc, "collect", lambda: 0)  # half a second each, with all that pytest holds

    def make(name, seconds, family="plain", result=lambda found: found, **options):
        given = itertools.cycle(seconds if isinstance(seconds, list) else [seconds])

        def prepare(case, inputs):
            found = {k: v for k, v in exact(case, inputs).items() if "without" not in k}
            return lambda: clock.takes(next(given), result(found))()

        return Provider(name, family, KINDS, options.pop("prepare", prepare), **options)

    return make


def rows_of(providers, settings=STEADY, case=HEAD, **options):
    record = measure_case(case, settings, ROOF, providers=providers, **options)
    return {row["provider"]: row for row in record["rows"]}


RIGHT = {"loss": 0.0, "alignment": 0.0, "grad_sqnorm": 0.0}


def test_a_whole_record(made) -> None:
    ticks = []
    providers = [
        made(OURS, 0.25, "ours"),
        made("plain one", 0.5, note="said beside it"),
        made("absent", 0.5, needs=("no_such_module",), refuse=lambda *_: "not reached"),
        made(
            "refusing", 0.5, refuse=lambda case, inputs: f"{len(inputs.labels)} rows of {case.name}"
        ),
    ]
    case = replace(HEAD, title="A title", heads=1)
    found = measure_case(case, STEADY, ROOF, ticks.append, providers)
    # 64 rows; three products of 2 * 5 * 7 operations and two reads of 7 float32 numbers a row.
    floor = 64 * (140 + 70) / 1e9
    common = {"family": "plain", "errors": RIGHT, "problem": None, "peak_bytes": None,
              "no_peak": None, "joules": None, "note": ""}  # fmt: skip
    assert found == {
        "title": "A title", "kind": "head", "rows_scored": 64, "classes": 5, "dim": 7, "heads": 1,
        "dtype": "float32", "measured": {"date": "today"}, "ceilings": ROOF,
        "floor_seconds": pytest.approx(floor),
        "best_plain": "plain one", "speedup": 2.0, "noise": 0.0,
        "skipped": [
            {"provider": "absent", "why": "not installed: no_such_module"},
            {"provider": "refusing", "why": "64 rows of head"},
        ],
        "rows": [
            {**common, "provider": OURS, "family": "ours", "seconds": 0.25,
             "quartiles": [0.25, 0.25], "rounds": 4, "flops": 64 * 210 / 0.25,
             "read_bytes": 2 * 64 * 28 / 0.25,
             "percent_of_floor": pytest.approx(400 * floor), "times_ours": 1.0},
            {**common, "provider": "plain one", "note": "said beside it", "seconds": 0.5,
             "quartiles": [0.5, 0.5], "rounds": 3, "flops": 64 * 210 / 0.5,
             "read_bytes": 2 * 64 * 28 / 0.5,
             "percent_of_floor": pytest.approx(200 * floor), "times_ours": 2.0},
        ],
    }  # fmt: skip
    assert ticks == [
        "head: float64", f"head: {OURS}", "head: plain one", *["head: timing"] * 4,
    ]  # fmt: skip


def test_what_is_left_to_the_settings(made, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(runner, "ceilings", lambda *given: asked.append(given) or ROOF)
    monkeypatch.setattr(
        runner, "providers_for", lambda *given: asked.append(given) or [made(OURS, 0.25, "ours")]
    )
    found = measure_case(
        replace(NARROW_HEAD, full=8), replace(STEADY, profile="full", registry="r")
    )
    assert [given[1] for given in asked] == ["r", torch.bfloat16] and asked[1][0] == "cpu"
    assert found["dtype"] == "bfloat16" and found["rows_scored"] == 8 and found["ceilings"] is ROOF
    assert found["best_plain"] is found["speedup"] is found["noise"] is None
    # Without ours there is nothing to relate to; of a network no work is known.
    (row,) = rows_of([made("other", 0.25)]).values()
    assert "times_ours" not in row
    case = replace(HEAD, kind="network")
    monkeypatch.setattr(runner, "make_inputs", lambda *_: None)
    monkeypatch.setattr(runner, "exact", lambda *_: {"loss": torch.ones(2)})
    free = made(OURS, 0.25, "ours", prepare=lambda *_: lambda: {"loss": torch.ones(2)})
    found = measure_case(case, STEADY, ROOF, providers=[free])
    assert found["floor_seconds"] is None
    assert not {"flops", "read_bytes", "percent_of_floor"} & set(found["rows"][0])


def test_rounds_of_quick_slow_and_impatient_jobs(made) -> None:
    calls = dict.fromkeys(("quick", "slow", "over budget", "at the limit", "warming"), 0)

    def counting(name, seconds):
        def count(found):
            calls[name] += 1
            return found

        return made(name, seconds, result=count)

    settings = replace(STEADY, least=4)
    found = rows_of(
        [
            counting("quick", 0.0625),
            counting("slow", 0.5),
            counting("over budget", 1.25),
            counting("at the limit", 1.5),
            counting("warming", [1.0] + [0.25] * 5),
        ],
        settings,
    )
    assert {name: row["rounds"] for name, row in found.items()} == {
        "quick": 5,  # the most
        "slow": 4,  # the least, though two would fit the budget
        "over budget": 3,  # where one call takes longer than all may
        "at the limit": 1,  # no further one
        "warming": 4,  # planned by the second call
    }
    assert calls == {"quick": 7, "slow": 6, "over budget": 5, "at the limit": 1, "warming": 6}
    assert found["at the limit"]["seconds"] == 1.5
    few = replace(settings, least=2, most=2)
    assert rows_of([counting("over budget", 1.25)], few)["over budget"]["rounds"] == 2
    on_it = replace(settings, budget=0.5)
    assert rows_of([counting("slow", 0.5)], on_it)["slow"]["rounds"] == 3


def test_what_fails_or_is_wrong_is_said_in_full(made) -> None:
    def off(factor):
        return lambda found: {**found, "alignment": factor * found["alignment"]}

    def raising(error):
        def prepare(case, inputs):
            warnings.warn("of a library", DeprecationWarning, stacklevel=1)
            raise error

        return prepare

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is shown
        found = rows_of(
            [
                made("off", 0.25, result=off(1.25)),
                made("just right", 0.25, result=off(1 + 0.99e-3)),
                made("just wrong", 0.25, result=off(1 + 1.01e-3)),
                made("nan", 0.25, result=off(float("nan"))),
                made("lines", 0.25, prepare=raising(RuntimeError("one\ntwo"))),
                made("empty", 0.25, prepare=raising(KeyError())),
                made("long", 0.25, prepare=raising(ValueError("x" * 300))),
            ]
        )
    assert {name: row["problem"] for name, row in found.items()} == {
        "off": "wrong: relative error 0.25, at most 0.001 is right",
        "just right": None,
        "just wrong": "wrong: relative error 0.001, at most 0.001 is right",
        "nan": "wrong: relative error nan, at most 0.001 is right",
        "lines": "failed: RuntimeError: one",
        "empty": "failed: KeyError: ",
        "long": f"failed: ValueError: {'x' * 200}",
    }
    for name, row in found.items():
        right = name == "just right"
        assert (row["seconds"] is not None) == ("rounds" in row) == ("flops" in row) == right
    assert found["off"]["errors"] == {**RIGHT, "alignment": pytest.approx(0.25)}
    assert found["lines"]["errors"] == {}


def test_compiling_is_left_out_of_the_small_profile_aloud(made) -> None:
    compiles = made("compiles", 0.25, compiles=True)
    found = measure_case(HEAD, STEADY, ROOF, providers=[compiles])
    why = (
        "the small profile compiles only in c10-d512, c100-d512, c1000-d512; --profile full has it"
    )
    assert found["skipped"] == [{"provider": "compiles", "why": why}] and found["rows"] == []


def row(provider, seconds, family="plain", norms=True):
    errors = {"loss": 0.0, "grad_sqnorm": 0.0} if norms else {"loss": 0.0}
    return {"provider": provider, "family": family, "seconds": seconds, "errors": errors}


def test_the_best_plain_row_and_ours() -> None:
    rows = [
        row(OURS, None, "ours"),
        row(NARROW, 0.1),
        row("no norms", 0.2, norms=False),
        row("failed", None),
        row("second", 0.5),
        row("first", 0.4),
        row("third", 0.6),
        row("gradients", 0.3, "autograd"),
        row("library", 0.05, "peer"),
    ]
    assert best_plain({"rows": rows})["provider"] == "first"
    assert best_plain({"rows": [r for r in rows if r["family"] != "plain"]}) is rows[7]
    assert best_plain({"rows": [*rows[:4], rows[8]]}) is None
    assert find_row({"rows": rows}) is None and find_row({"rows": rows}, "third") is rows[6]
    assert find_row({"rows": [row("x", 1.0, "ours"), row(OURS, 2.0)]})["seconds"] == 2.0


def test_noise_is_the_spread_of_the_ratio_over_common_rounds(made) -> None:
    def compared(mine, theirs):
        record = {"rows": [row(OURS, 2.0, "ours"), row("p", 3.0)], "floor_seconds": 0.5}
        entries = [
            runner._Entry(made(OURS, 1.0), times=mine),
            runner._Entry(made("p", 1.0), times=theirs),
        ]
        runner._compare(record, entries)
        return record

    mine = {0: 1.0, 1: 2.0, 2: 1.0, 3: 4.0, 4: 1.0, 5: 8.0}
    record = compared(mine, {0: 1.0, 1: 4.0, 3: 12.0, 4: 4.0, 5: 40.0})  # ratios 1, 2, 3, 4, 5
    assert record["noise"] == pytest.approx((4 - 2) / 3) and record["speedup"] == 1.5
    assert record["best_plain"] == "p"
    assert [r["percent_of_floor"] for r in record["rows"]] == [25.0, pytest.approx(100 / 6)]
    assert [r["times_ours"] for r in record["rows"]] == [1.0, 1.5]
    assert compared(mine, {0: 1.0, 1: 4.0})["noise"] is None
    assert compared(mine, {0: 1.0, 1: 4.0, 2: 3.0})["noise"] == pytest.approx((2.5 - 1.5) / 2)


@pytest.mark.parametrize("every", [False, True])
def test_whose_memory_is_measured(monkeypatch, every) -> None:
    rows = [
        row(OURS, 1.0, "ours"),
        row(f"{OURS}, torch backend", 1.0, "ours"),
        row("fastest", 1.0),
        row("slower", 2.0),
        row("gradients", 3.0, "autograd"),
        row("library", 3.0, "peer"),
        row("failed", None, "peer"),
    ]
    asked, ticks = [], []

    def peak(*given):
        asked.append(given)
        return (None, "no reason") if given[2] == "library" else (100 + len(asked), None)

    monkeypatch.setattr(runner, "peak_bytes_in_child", peak)
    settings = Settings(memory_limit=7.0, all_memory=every, registry="r")
    runner.add_memory(HEAD, {"rows": rows, "rows_scored": 12}, settings, ticks.append)
    named = [OURS, "fastest", "gradients", "library"]
    if every:
        named = [r["provider"] for r in rows[:-1]]
    assert asked == [(HEAD, 12, name, torch.get_num_threads(), 7.0, "r") for name in named]
    assert ticks == [f"head: memory of {name}" for name in named]
    for number, name in enumerate(named, start=101):
        (found,) = (r for r in rows if r["provider"] == name)
        there = (None, "no reason") if name == "library" else (number, None)
        assert (found["peak_bytes"], found["no_peak"]) == there
    assert not any("peak_bytes" in r for r in rows if r["provider"] not in named)


def test_memory_is_measured_with_the_case_where_it_is_asked_for(made, monkeypatch) -> None:
    monkeypatch.setattr(runner, "peak_bytes_in_child", lambda *_: (5, None))
    providers = [made(OURS, 0.25, "ours")]
    for limit, peak in ((1.0, 5), (0.0, None)):
        found = rows_of(providers, replace(STEADY, memory_limit=limit))
        assert found[OURS]["peak_bytes"] == peak


def test_a_gpu_is_asked_for_its_own_peak_and_energy(made, monkeypatch) -> None:
    did = []
    honest = runner.make_inputs
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        runner, "make_inputs", lambda case, rows, device: did.append(device) or honest(case, rows)
    )
    monkeypatch.setattr(
        runner, "allocator_peak", lambda job, device: did.append((device, set(job()))) or 77
    )
    counters = {"cuda:1": lambda: 0.0}
    monkeypatch.setattr(runner, "gpu_energy_counter", lambda device: counters.pop(device, None))

    def joules(job, counter, wait):
        did.append((set(job()), counter(), wait.func is torch.cuda.synchronize, wait.args))
        return 2.5

    monkeypatch.setattr(runner, "joules_per_call", joules)
    monkeypatch.setattr(runner, "peak_bytes_in_child", lambda *_: did.append("child"))
    wrong = made("wrong", 0.25, result=lambda found: {"loss": 2 * found["loss"]})
    providers = [made(OURS, 0.25, "ours"), wrong, made("plain one", 0.5)]
    found = rows_of(providers, replace(STEADY, device="cuda:1", memory_limit=5.0))
    job = set(RIGHT)
    assert did == [
        "cuda:1", ("cuda:1", job), (job, 0.0, True, ("cuda:1",)), ("cuda:1", job),
    ]  # fmt: skip
    assert [(r["peak_bytes"], r["joules"]) for r in found.values()] == [
        (77, 2.5), (None, None), (77, None),
    ]  # fmt: skip


def test_settings_of_the_profiles() -> None:
    """The small one comes in under three minutes; the full one is what is committed."""
    small = Settings.of_profile("small", device="cuda", memory_limit=1.0)
    assert small == Settings("small", "cuda", 3, 11, 0.3, 1.5, 1.0, False)
    full = Settings.of_profile("full", registry="r", most=9)
    assert full == Settings("full", "cpu", 5, 9, 1.0, 6.0, 60.0, True, "r")
    assert Settings.of_profile("full").most == 15
    assert Settings().registry == full.of_profile("full").registry == "moso_fast.bench.providers"


def test_sequences_are_held_to_every_quantity_that_is_given(made) -> None:
    """Also to the alignment without the bias, of methods that leave it out."""
    given = []

    def prepare(case, inputs):
        found = exact(case, inputs)
        given.append(set(found))
        return lambda: {"alignment_without_bias": 2 * found["alignment_without_bias"]}

    (found,) = rows_of([made("no bias", 0.25, prepare=prepare)], case=SEQUENCES).values()
    assert found["problem"] == "wrong: relative error 1, at most 0.001 is right"
    assert given == [{*RIGHT, "alignment_without_bias"}]
