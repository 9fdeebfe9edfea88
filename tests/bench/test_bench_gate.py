"""The regression gate passes on the code as it is and fails on a deliberate slowdown."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace
from functools import partial

import pytest

from benches.gate import command, counts, gate
from moso_fast.bench import cases
from moso_fast.bench.inputs import make_inputs
from moso_fast.bench.providers import PROVIDERS
from moso_fast.bench.providers.ours import OURS
from moso_fast.util import native

needs_native = pytest.mark.skipif(
    native.load_native("_cpu").module is None, reason="the C++ module is not built"
)
needs_valgrind = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="valgrind is not installed"
)
SIZES = (10, 200, 40)


@pytest.mark.exhaustive
@needs_native
@needs_valgrind
def test_instructions_repeat_and_a_slower_kernel_shows() -> None:
    honest, instruction_set = counts.count_instructions(*SIZES)
    again, _ = counts.count_instructions(*SIZES)
    assert again == pytest.approx(honest, rel=0.01)
    # The deliberate slowdown: what the choice of kernel or instruction set would cost if lost.
    slow, slow_set = counts.count_instructions(*SIZES, few_classes=False)
    assert slow_set == instruction_set
    held = {"compiler": "c", "instructions": {"c10": round(honest), "c10_instruction_set": "s"}}
    for count, passes in ((again, True), (slow, False)):
        found = {"compiler": "c", "instructions": {"c10": round(count), "c10_instruction_set": "s",
                                                   "c100": "not counted"}}  # fmt: skip
        findings, skipped = gate._hold_instructions(held, found)
        assert [f.passed for f in findings] == [passes], findings
        assert skipped == ["instructions of c100: not counted"]
    other = {**held, "compiler": "another"}
    findings, skipped = gate._hold_instructions(other, found)
    assert not findings and "counted with another and s" in skipped[0]


def test_without_valgrind_it_says_so(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert counts.count_instructions(*SIZES) == "valgrind is not installed"


@pytest.mark.raw_memory
def test_calls_are_exact_and_more_of_them_show(monkeypatch) -> None:
    honest = counts.count_calls()
    assert counts.count_calls() == honest and min(honest.values()) >= 10
    problem = counts.build_problem(*make_inputs(cases.CASES["c10-d512"], 8).head)
    backend = type(counts.choose(problem)[0])
    prepare = backend.prepare

    def slowed(self, *arguments):  # decides twice and does the job twice
        prepare(self, *arguments)
        passes = prepare(self, *arguments)
        job = {name: getattr(passes, name) for name in ("whole", "first")}

        def twice(name, *given, **options):
            job[name](*given, **options)
            return job[name](*given, **options)

        for name in job:
            monkeypatch.setattr(passes, name, partial(twice, name))
        return passes

    monkeypatch.setattr(backend, "prepare", slowed)
    slow = counts.count_calls()
    for name, kept in honest.items():
        assert gate._at_most("calls", name, kept, kept).passed
        assert not gate._at_most("calls", name, slow[name], kept).passed


@needs_native
def test_ratio_fails_on_a_deliberate_slowdown(tmp_path, monkeypatch, capsys) -> None:
    """Every call of ours done four times: the ratio inside one run falls under its bound."""
    small = replace(cases.CASES["c10-d512"], small=4096)
    monkeypatch.setitem(cases.CASES, "c10-d512", small)
    honest = statistics.median(counts.ratio(small, rounds=7) for _ in range(3))
    path = tmp_path / "gate.json"
    held = {"compiler": "-", "torch": "-", "instructions": {}, "calls": {},
            "least_ratios": {"c10-d512": honest / 2}}  # fmt: skip
    path.write_text(json.dumps(held))
    monkeypatch.setattr(counts, "count_instructions", lambda *sizes: "left out here")
    assert command.main([str(path)]) == 0, capsys.readouterr().out
    capsys.readouterr()

    def repeated(provider):
        def prepare(case, inputs):
            job = provider.prepare(case, inputs)
            return lambda: [job() for _ in range(4)]

        return replace(provider, prepare=prepare) if provider.name == OURS else provider

    slowed = tuple(map(repeated, PROVIDERS))
    monkeypatch.setattr(counts, "providers_for", lambda case: [p for p in slowed if p.takes(case)])
    assert command.main([str(path)]) == 1
    shown = capsys.readouterr().out
    assert "ratio, c10-d512" in shown and "WORSE" in shown
    assert "calls: counted with torch -" in shown


def test_a_gate_is_written_and_read(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(counts, "count_instructions", lambda *sizes: "left out here")
    monkeypatch.setattr(gate, "LEAST_RATIOS", {})
    path = tmp_path / "gate.json"
    assert command.main([str(path), "--write", "--quiet"]) == 0
    assert command.main([str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] and {f["name"] for f in answer["findings"]} == {
        "calls, operations",
        "calls, python_calls",
    }
    for text, why in (("[]", "it lacks compiler, torch"), ("{", "is no gate file of moso_fast: ")):
        path.write_text(text)
        with pytest.raises(SystemExit) as ended:
            command.main([str(path)])
        assert ended.value.code == 2 and why in capsys.readouterr().err
