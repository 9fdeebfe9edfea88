"""README and docs agree with the committed results they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benches import readme

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.generated
@pytest.mark.skipif(
    not (ROOT / readme.RESULTS).is_file(), reason=f"no full run is committed yet: {readme.RESULTS}"
)
def test_block_is_what_the_results_give() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rewritten(text) == text, "run `python benches/readme.py`"


@pytest.mark.generated
@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_numbers_agree_with_their_files(page: Path) -> None:
    assert readme.page_errors(page, page.read_text(encoding="utf-8")) == []


def test_a_changed_number_is_noticed(tmp_path) -> None:
    folder = tmp_path / "benches" / "results"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(json.dumps({"a": [{"seconds": 0.01234}]}))
    source = "<!-- benches/results/x.json /a/0/seconds *1000 -->"
    assert readme.number_errors(f"takes 12.3{source} ms", tmp_path) == []
    assert readme.number_errors(f"takes 12{source} ms", tmp_path) == []
    assert "12.4 is 12.34" in readme.number_errors(f"takes 12.4{source} ms", tmp_path)[0]
    gone = source.replace("/0/", "/1/")
    assert "has nothing at" in readme.number_errors(f"takes 12.3{gone} ms", tmp_path)[0]
    assert "no results file" in readme.number_errors("It takes 12 ms.", tmp_path)[0]
    assert "no results file" in readme.number_errors("It is 3.5 times as fast.", tmp_path)[0]
    assert readme.number_errors("```\n12 ms\n```\nat least 1 sample", tmp_path) == []


def test_the_tuning_notes_need_no_source_but_their_tied_numbers_hold() -> None:
    notes = ROOT / readme.RECORD
    assert notes in readme.pages() and "ms" in notes.read_text(encoding="utf-8")
    source = "<!-- benches/results/cpu.json /rows/0/C -->"
    assert readme.page_errors(notes, f"It takes 12 ms. 10{source}") == []
    assert readme.page_errors(notes, f"11{source}") != []
    assert readme.page_errors(ROOT / "docs" / "other.md", "It takes 12 ms.") != []
