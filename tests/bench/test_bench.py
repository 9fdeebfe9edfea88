"""The benchmark suite's parts: exact answers, checks before numbers, memory, fits, files."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from bench_cases import HEAD, HEADS, NETWORK, QUICK, ROOF, SEQUENCES

from moso_fast.bench import energy, measure, memory, runner, store
from moso_fast.bench.cases import CASES, COMPILED_CASES, PROFILES, Case, select_cases
from moso_fast.bench.inputs import exact, make_inputs
from moso_fast.bench.providers import PROVIDERS, Provider, providers_for
from moso_fast.bench.providers.ours import OURS
from moso_fast.core.reference import explicit_stats


@pytest.mark.parametrize("case", [HEAD, SEQUENCES, HEADS])
def test_exact_answers_equal_explicit_gradients(case) -> None:
    inputs = make_inputs(case, 24)
    reference = explicit_stats(*inputs.head, cu_seqlens=inputs.cu_seqlens)
    truth = exact(case, inputs)
    for name in ("loss", "alignment", "grad_sqnorm"):
        torch.testing.assert_close(
            truth[name].reshape(-1), getattr(reference, name).reshape(-1), rtol=1e-11, atol=1e-13
        )


def test_exact_answer_without_the_bias() -> None:
    inputs = make_inputs(HEAD, 24)
    without = explicit_stats(inputs.features, inputs.weight, inputs.labels)
    inputs.bias.zero_()  # the logits agree, so only the bias gradient differs
    truth = exact(HEAD, inputs)
    torch.testing.assert_close(truth["alignment_without_bias"], without.alignment[0])
    assert not torch.allclose(truth["alignment"], without.alignment[0])


def test_registry() -> None:
    assert len({p.name for p in PROVIDERS if "head" in p.kinds}) == sum(
        "head" in p.kinds for p in PROVIDERS
    )
    for case in CASES.values():
        assert 0 < case.small <= case.full
        assert not case.tokens or case.small % case.tokens == case.full % case.tokens == 0
        names = [p.name for p in providers_for(case)]
        assert names[0] == OURS and len(names) == len(set(names)) > 3
        assert any(p.family == "plain" for p in providers_for(case)) or case.kind == "network"
    assert [c.name for c in select_cases(["c10-*"])] == ["c10-d512", "c10-d2048", "c10-d512-bf16"]
    with pytest.raises(ValueError, match="no case matches 'c11'"):
        select_cases(["c11"])
    with pytest.raises(ValueError, match="profile must be one of small, full"):
        HEAD.rows("huge")


def _with_result(name: str, change) -> Provider:
    honest = next(p for p in PROVIDERS if p.name == "naive")

    def prepare(case, inputs):
        job = honest.prepare(case, inputs)
        return lambda: change(job())

    return replace(honest, name=name, prepare=prepare)


def _fail(result):
    raise RuntimeError("out of luck\nsecond line")


def test_a_wrong_result_gets_no_number() -> None:
    broken = [
        _with_result("off", lambda r: {**r, "alignment": 1.01 * r["alignment"]}),
        _with_result("silent", lambda r: {**r, "loss": r["loss"] * float("nan")}),
        _with_result("raises", _fail),
    ]
    providers = [*providers_for(HEAD)[:3], *broken]
    record = runner.measure_case(HEAD, QUICK, ROOF, providers=providers)
    rows = {row["provider"]: row for row in record["rows"]}
    assert rows["off"]["problem"].startswith("wrong: relative error 0.01")
    assert rows["silent"]["problem"].startswith("wrong: relative error nan")
    assert rows["raises"]["problem"] == "failed: RuntimeError: out of luck"
    assert all(rows[p.name]["seconds"] is None and "times_ours" not in rows[p.name] for p in broken)
    assert rows["naive"]["seconds"] > 0 and rows["naive"]["problem"] is None
    assert record["best_plain"] == "naive"
    ratio = rows["naive"]["seconds"] / rows[OURS]["seconds"]
    assert record["speedup"] == rows["naive"]["times_ours"] == ratio


def test_ours_is_held_to_the_contract() -> None:
    """An error that plain PyTorch may have is too much for the package itself."""
    ours = providers_for(HEAD)[0]

    def prepare(case, inputs):
        job = ours.prepare(case, inputs)
        return lambda: {name: value * (1 + 1e-4) for name, value in job().items()}

    record = runner.measure_case(
        HEAD, QUICK, ROOF, providers=[replace(ours, prepare=prepare), *providers_for(HEAD)[2:3]]
    )
    assert record["rows"][0]["problem"].startswith("wrong")
    assert record["speedup"] is None and record["noise"] is None


def test_missing_libraries_are_skipped_by_name() -> None:
    absent = replace(providers_for(HEAD)[2], name="absent", needs=("no_such_module_here",))
    record = runner.measure_case(HEAD, QUICK, ROOF, providers=[providers_for(HEAD)[0], absent])
    assert record["skipped"] == [
        {"provider": "absent", "why": "not installed: no_such_module_here"}
    ]


@pytest.mark.exhaustive
def test_the_small_profile_compiles_in_few_cases() -> None:
    compiles = replace(providers_for(HEAD)[2], name="compiles", compiles=True)
    providers = [providers_for(HEAD)[0], compiles]

    def skipped(case, **options):
        settings = replace(QUICK, **options)
        return runner.measure_case(case, settings, ROOF, providers=providers)["skipped"]

    (left_out,) = skipped(HEAD)
    assert left_out["provider"] == "compiles" and "--profile full has it" in left_out["why"]
    assert not skipped(HEAD, profile="full")
    assert not skipped(replace(HEAD, name=COMPILED_CASES[0]))
    assert set(COMPILED_CASES) < set(CASES)
    assert [p.name for p in PROVIDERS if p.compiles] == ["torch.compile, chunks of 2048"]


def test_a_slow_product_is_not_made_whole(monkeypatch) -> None:
    sides = []

    def rate(a, b, device):
        sides.append(len(a))
        return 1e3

    monkeypatch.setattr(measure, "_MATRIX", 512)
    monkeypatch.setattr(measure, "_READ_BYTES", 2**20)
    monkeypatch.setattr(measure, "_narrow_rate", rate)
    assert measure.ceilings(dtype=torch.bfloat16)["bf16_flops"] == 1e3
    assert sides == [measure._PROBE]
    monkeypatch.setattr(measure, "_narrow_rate", lambda a, b, device: sides.append(len(a)) or 1e18)
    assert measure.ceilings(dtype=torch.bfloat16)["bf16_flops"] == 1e18
    assert sides == [measure._PROBE, measure._PROBE, 512]


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    jobs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = measure.interleaved(jobs, {"a": 4, "b": 2})
    rounds = ["".join(sorted(order[at:end])) for at, end in ((0, 1), (1, 3), (3, 4), (4, 6))]
    assert rounds == ["a", "ab", "a", "ab"] and len(order) == 6
    assert list(times["a"]) == [0, 1, 2, 3] and list(times["b"]) == [1, 3]
    assert measure.plan_rounds(0.1, 1.0, 3, 20) == 10
    assert measure.plan_rounds(5.0, 1.0, 3, 20) == 3
    assert measure.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_no_job_always_follows_the_same_other() -> None:
    """Each comes first, last and behind every other, in the same rounds of every run."""
    names, order = "abcd", []
    jobs = {name: lambda name=name: order.append(name) for name in names}
    measure.interleaved(jobs, 60)
    rounds = ["".join(order[at : at + 4]) for at in range(0, 240, 4)]
    assert all(sorted(one) == list(names) for one in rounds) and len(set(rounds)) > 12
    follows = Counter(one[at : at + 2] for one in rounds for at in range(3))
    assert len(follows) == 12 and max(follows.values()) < 30
    first = list(order)
    order.clear()
    measure.interleaved(jobs, 60)
    assert order == first


def test_floor() -> None:
    case = Case("", "", "head", 10, 100, 0, 0)
    roof = {"read_bytes": 4e3, "flops": 1e4, "bf16_flops": 2e4}
    # A row: 400 bytes take 0.1 s; the products of the passes 0.4 s and 0.2 s.
    assert measure.floor_seconds(case, 3, roof) == pytest.approx(3 * 0.6)
    assert measure.floor_seconds(replace(case, classes=1), 3, roof) == pytest.approx(3 * 0.2)
    narrow = replace(case, dtype=torch.bfloat16)
    assert measure.floor_seconds(narrow, 3, roof) == pytest.approx(3 * 0.3)
    slow = {**roof, "bf16_flops": 1e2}  # no units for it: float32 is the ceiling
    assert measure.floor_seconds(narrow, 3, slow) == pytest.approx(3 * 0.6)
    assert measure.floor_seconds(NETWORK, 3, roof) is None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_ceilings_are_at_least_what_torch_reaches(monkeypatch) -> None:
    monkeypatch.setattr(measure, "_MATRIX", 256)
    monkeypatch.setattr(measure, "_READ_BYTES", 2**20)
    roof = measure.ceilings(dtype=torch.bfloat16)
    assert set(roof) == set(ROOF) and all(rate > 1e6 for rate in roof.values())
    assert roof["flops"] >= roof["mm_flops"]
    assert set(measure.ceilings()) == set(ROOF) - {"bf16_flops"}


@pytest.mark.exhaustive
def test_peak_memory_of_a_job() -> None:
    case = replace(HEAD, classes=100, dim=8)
    rows = 100_000  # logits and residuals of naive: 40 MB each
    lean, _ = memory.peak_bytes_in_child(case, rows, "chunks of 512", 1, 60)
    naive, why = memory.peak_bytes_in_child(case, rows, "naive", 1, 60)
    assert why is None
    assert 75e6 < naive < 180e6
    assert 38e6 < lean < naive  # it keeps the residuals
    nothing, why = memory.peak_bytes_in_child(case, rows, "no such provider", 1, 60)
    assert nothing is None and why.startswith("failed: StopIteration")


def test_a_child_that_takes_too_long_is_ended() -> None:
    start = time.monotonic()
    peak, why = memory.peak_bytes_in_child(replace(HEAD, classes=2000), 200_000, "naive", 1, 0.3)
    assert peak is None and why == "not done within 0 s"
    assert time.monotonic() - start < 20


def test_energy_of_a_call() -> None:
    used = [0.0]

    def job() -> None:
        used[0] += 3.0
        time.sleep(0.01)

    assert energy.joules_per_call(job, lambda: used[0], seconds=0.05) == pytest.approx(3.0)
    if not torch.cuda.is_available():
        assert energy.gpu_energy_counter("cuda") is None


def _results(name: str, speed: float, **other) -> dict:
    row = {"provider": "naive", "family": "plain", "seconds": speed, "times_ours": speed,
           "quartiles": [speed, speed], "rounds": 5}  # fmt: skip
    record = {"rows": [row], "noise": 0.02}
    machine = {"processor": "p", "threads": 1}
    return {"schema": store.SCHEMA, "profile": "small", "machine": machine,
            "cases": {name: record}, **other}  # fmt: skip


def test_results_of_several_runs_fill_one_file(tmp_path) -> None:
    path = tmp_path / "small.json"
    first, second = _results("c100-d512", 2.0), _results("c10-d512", 3.0, growth={"N": {}})
    store.save(first, path)
    merged = store.merge(store.load(path), second, path)
    assert list(merged["cases"]) == ["c10-d512", "c100-d512"] and merged["growth"] == {"N": {}}
    again = store.merge(merged, _results("c100-d512", 4.0), path)
    assert again["cases"]["c100-d512"]["rows"][0]["seconds"] == 4.0 and again["growth"] == {"N": {}}
    elsewhere = {**second, "machine": {"processor": "q", "threads": 1}}
    with pytest.raises(ValueError, match="another machine"):
        store.merge(merged, elsewhere, path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no results file"):
        store.load(path)


def test_profiles_of_settings() -> None:
    assert PROFILES == ("small", "full")
    small, full = (runner.Settings.of_profile(p) for p in PROFILES)
    assert full.budget > small.budget and full.all_memory and not small.all_memory
