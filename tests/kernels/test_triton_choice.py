"""Which regime the Triton backend chooses for a problem, and the reasons that it gives."""

from __future__ import annotations

import re

import pytest
import torch
from core_support import prepared, random_case
from triton_cases import needs_triton, problem_of, shape

from moso_fast.backends.triton import choice as triton_choice
from moso_fast.backends.triton.backend import TritonBackend
from moso_fast.backends.triton.choice import REGIMES, RULES, Rule, choose_regime
from moso_fast.backends.triton.regimes import few_classes as triton_few_classes
from moso_fast.core.memory import make_plan
from moso_fast.functional import explain, moso_scores


def test_every_rule_names_a_regime_and_says_why() -> None:
    assert {rule.regime for rule in RULES} == set(REGIMES)
    source = re.compile(r"(measured( kernel by kernel)? on an \S+|modelled, not measured.*?): ")
    for rule in RULES:
        # Where the bounds come from, and what was found.
        found = source.match(rule.why)
        assert found and len(rule.why) > found.end() + 20 and "\n" not in rule.why, rule.regime
    last = RULES[-1]
    assert (last.max_width, last.max_dim) == (None, None)
    assert (last.rounded, last.residuals_kept) == (None, None)


@needs_triton
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("classes", [1, 10, 100, 257, 1000, 16_384, 16_385, 128_256])
@pytest.mark.parametrize("dim", [1, 512, 4096])
def test_every_problem_finds_a_regime_that_fits(classes, dim, kept) -> None:
    problem = shape(classes, dim)
    choice = choose_regime(problem, kept)
    assert choice.regime.fits(problem) is None
    chosen = [rule for rule in RULES if rule.regime == choice.regime.name]
    assert choice.reasons[-1] in [f"{rule.regime}: chosen, {rule.why}" for rule in chosen]
    assert all("not used, " in reason for reason in choice.reasons[:-1])
    job = choice.regime(problem, make_plan(problem, None))
    assert job.row_bytes() > 0 and job.fixed_bytes() >= 0 and job.describe()


@needs_triton
@pytest.mark.parametrize(
    "classes, dim, heads, kept, rounded, wide",  # with bfloat16 products, with float32 ones
    [
        (10, 512, 1, True, "row_tiles", "blas"),
        (64, 512, 1, True, "row_tiles", "blas"),
        (65, 512, 1, True, "stored", "blas"),
        (256, 512, 1, True, "stored", "blas"),
        (257, 512, 1, True, "blas", "blas"),
        (128_256, 4096, 1, True, "blas", "blas"),
        (10, 512, 3, True, "few_classes", "blas"),
        (100, 512, 3, True, "blas", "blas"),
        (257, 1024, 1, False, "recompute", "recompute"),
        (257, 1025, 1, False, "blas", "blas"),
        (65, 1025, 1, False, "stored", "blas"),
    ],
)
def test_the_table(classes, dim, heads, kept, rounded, wide, machine, monkeypatch) -> None:
    monkeypatch.setattr(triton_few_classes, "triton_version", lambda: (3, 9))
    machine()
    for dtype, expected in ((torch.bfloat16, rounded), (torch.float32, wide)):
        problem = shape(classes, dim, heads, dtype=dtype, precision="medium")
        assert choose_regime(problem, kept).regime.name == expected, dtype


def test_rules_may_ask_for_rounded_operands() -> None:
    rules = (Rule("stored", "for the test", rounded=True), Rule("blas", "for the test"))
    found = choose_regime(shape(3, 5), True, rules=rules)
    assert found.reasons[0] == "stored: not used, operands are float32"
    assert choose_regime(shape(3, 5, dtype=torch.bfloat16), True, rules=rules).regime.name == (
        "stored"
    )
    rules = (Rule("stored", "for the test", rounded=False), rules[1])
    found = choose_regime(shape(3, 5, dtype=torch.bfloat16), True, rules=rules)
    assert found.reasons[0] == "stored: not used, operands are rounded to bfloat16"


def test_the_first_rule_whose_bounds_hold_decides() -> None:
    why = "modelled, not measured: for the test"
    rules = (
        Rule("stored", why, max_width=20, max_dim=8, residuals_kept=True),
        Rule("blas", why),
    )

    def chosen(*arguments: int, kept: bool = True) -> tuple[str, str]:
        choice = choose_regime(shape(*arguments), kept, rules=rules)
        return choice.regime.name, choice.reasons[0]

    assert chosen(20, 8)[0] == "stored"
    assert chosen(21, 8) == ("blas", "stored: not used, K C = 21 is above 20")
    assert chosen(7, 8, 3) == ("blas", "stored: not used, K C = 21 is above 20")
    assert chosen(20, 9) == ("blas", "stored: not used, D = 9 is above 8")
    assert chosen(20, 8, kept=False) == ("blas", "stored: not used, residuals are not kept")


@needs_triton
def test_a_regime_can_be_forced(machine, monkeypatch) -> None:
    machine(interpret=True)
    problem = problem_of(random_case("ids"))
    for name in REGIMES:
        monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", name)
        assert choose_regime(problem, True, triton_choice.forced_regime()).regime.name == name
        assert f"regime {name}, " in prepared("triton", problem).describe()
        monkeypatch.delenv("MOSO_FAST_TRITON_REGIME")
        assert f"regime {name}, " in prepared(TritonBackend(name), problem).describe()
    monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "")
    assert triton_choice.forced_regime() is None
    monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "fast")
    known = ", ".join(REGIMES)
    message = f"MOSO_FAST_TRITON_REGIME must be one of {known}; got 'fast'"
    assert TritonBackend().supports(problem) == message
    with pytest.raises(ValueError, match=f"cannot run this problem: {message}"):
        moso_scores(*random_case("ids").args, backend="triton")


@needs_triton
def test_explain_says_regime_tiles_reads_memory_and_reasons(machine, monkeypatch) -> None:
    machine(interpret=True)
    monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "stored")
    text = explain(*random_case("ids", n=300, c=9, d=40).args, backend="triton")
    assert "plan      triton: regime stored, float32 logits by cuBLAS, residuals in place" in text
    assert "R^T H tile " in text and "stored: asked for" in text
    assert "features read 4 times in all; at most about " in text and "MiB beyond" in text
    monkeypatch.delenv("MOSO_FAST_TRITON_REGIME")
    text = explain(*random_case("ids").args, backend="triton")
    assert any(f"{rule.regime}: chosen, {rule.why}" in text for rule in RULES)
