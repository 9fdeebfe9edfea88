"""benches/results/triton_aot.md: made of its JSON file, complete, and true for a sample."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

pytestmark = pytest.mark.generated


@pytest.fixture
def resources():
    return importlib.import_module("benches.triton_resources")


def test_table_is_made_of_the_figures(resources) -> None:
    versions = resources.load()
    assert resources.TABLE.read_text(encoding="utf-8") == resources.render(versions)
    assert resources.JSON.read_text(encoding="utf-8") == resources.dump(versions)


def test_every_tile_is_there_for_the_oldest_and_a_newer_triton(resources) -> None:
    versions = resources.load()
    assert len(versions) > 1 and any(version.startswith("3.6.") for version in versions)
    for version, found in versions.items():
        expected = {
            case.name: {f"sm_{arch}" for arch in resources.architectures(case)}
            for case in resources.cases(version)
        }
        assert {name: set(row) for name, row in found.items()} == expected, version


def test_every_kernel_has_a_case(resources) -> None:
    named = {case.kernel.__name__ for case in resources.cases("4.0")}
    files = Path(resources.ROOT, "kernels").glob("*.py")
    shipped = {name for f in files for name in re.findall(r"def (\w+_kernel)\(", f.read_text())}
    assert shipped - named == set()


def test_no_tile_spills(resources) -> None:
    for version, found in resources.load().items():
        for name, row in found.items():
            assert all(stack == 0 for _, stack, _, _ in row.values()), (version, name)


def test_a_sample_is_compiled_again(resources) -> None:
    import triton

    found = resources.load().get(triton.__version__)
    if found is None:
        pytest.skip(f"the table has no figures of Triton {triton.__version__}")
    sample = list(
        {case.kernel.__name__: case for case in resources.cases(triton.__version__)}.values()
    )
    assert len(sample) > 4
    for case in sample:
        assert resources.figures(case, 90) == found[case.name]["sm_90"], case.name
