"""benches/results/gpu_predictions.*: what the script makes of the code as it is; no GPU."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the regimes' tables are in the Triton kernels' modules")

from moso_fast._native import load_native
from moso_fast.backends._triton_choice import REGIMES

BENCHES = Path(__file__).resolve().parents[1] / "benches"
WIDTHS = {"few_classes": (10, 512), "recompute": (300, 256), "stored": (300, 512), "blas": (9, 512)}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    return importlib.import_module("gpu_model")


@pytest.fixture
def script(model):
    return importlib.import_module("gpu_predictions")


def test_committed_predictions_follow_the_code(script) -> None:
    if load_native("_cuda").module is None:
        pytest.skip("moso_fast._cuda, whose plans are part of the table, is not built")
    found = script.record()
    assert script.JSON_FILE.read_text(encoding="utf-8") == script.dump(found)
    assert script.TABLE_FILE.read_text(encoding="utf-8") == script.render(found)


def test_table_is_made_of_the_figures(script) -> None:
    found = json.loads(script.JSON_FILE.read_text(encoding="utf-8"))
    assert script.TABLE_FILE.read_text(encoding="utf-8") == script.render(found)
    asked = {(*shape, str(dtype)[6:], p) for shape in script.TABLE for dtype, p in script.KINDS}
    names = ("n", "classes", "dim", "dtype", "precision")
    assert {tuple(row[name] for name in names) for row in found["rows"]} == asked


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_read_the_features_as_often_as_the_regime_says(model, regime, dtype) -> None:
    classes, dim = WIDTHS[regime]
    precision = "medium" if dtype == torch.bfloat16 else "highest"
    found = model.predict_triton((50_000, classes, dim), dtype, precision, regime=regime)
    reads = sum(step.feature_reads for step in found.steps)
    assert reads == REGIMES[regime].feature_reads
    size = 50_000 * dim * dtype.itemsize
    for step in found.steps:
        assert step.bytes >= step.feature_reads * size
    products = sum(step.flops for step in found.steps)
    assert products >= 3 * 2 * 50_000 * classes * dim


def test_time_is_the_longer_of_bytes_and_products_and_the_launches(model) -> None:
    roofline = importlib.import_module("gpu_roofline")
    gpu = roofline.H200
    memory = roofline.Step("", gpu.read, gpu.flops["tf32"] / 2, "tf32")
    products = roofline.Step("", gpu.read / 4, gpu.flops["tf32"] / 2, "tf32")
    assert memory.seconds(gpu) == 1.0 and memory.bound(gpu) == "memory"
    assert products.seconds(gpu) == 0.5 and products.bound(gpu) == "products"
    job = roofline.Prediction("triton", "", (memory, products), True, 1, 10**6)
    assert job.seconds(gpu) == pytest.approx(1.5 + 1e6 * roofline.LAUNCH_SECONDS)
    assert job.seconds(gpu, graph=False) == pytest.approx(1e6 * roofline.HOST_SECONDS)


def test_products_of_terms_are_those_of_the_kernels(model) -> None:
    """As the table at the head of csrc/cuda/operands.cuh has them."""
    counts = {(1, 1): 1, (2, 2): 3, (3, 3): 6, (1, 2): 2, (1, 3): 3, (2, 3): 5, (2, 1): 2}
    assert {terms: model._products(*terms) for terms in counts} == counts


def test_what_cannot_run_is_not_predicted(model) -> None:
    with pytest.raises(ValueError, match="few_classes"):
        model.predict_triton((1000, 1000, 512), torch.float32, "highest", regime="few_classes")
    if load_native("_cuda").module is not None:
        found = model.predict_cuda((1000, 1000, 512), torch.float32, "highest")
        assert "112 classes" in found


def test_contenders_are_predicted_by_their_names(model, monkeypatch) -> None:
    monkeypatch.setattr(model, "triton_version", lambda: (3, 9, 0))
    shape, gpu = (50_000, 10, 512), model.H200

    def seconds(name: str) -> float | None:
        return model.predicted_seconds(shape, torch.bfloat16, "medium", name, gpu)

    assert seconds("eager") is None and seconds("torch") is None
    assert 0 < seconds("triton (graph)") < seconds("triton") < seconds("triton/blas")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts its own interpreter")
def test_launches_are_those_that_are_counted(script) -> None:
    committed = json.loads(script.COUNTS.read_text(encoding="utf-8"))
    for name, (once, each) in script.count().items():
        # Versions of PyTorch compose a few operations differently.
        assert abs(once - committed[name][0]) <= 4 and abs(each - committed[name][1]) <= 4, name
