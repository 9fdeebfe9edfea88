"""benches/results/gpu_predictions.*: what the model makes of the code as it is; no GPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the regimes' tables are in the Triton kernels' modules")

from moso_fast.backends.triton.choice import REGIMES
from moso_fast.util.native import load_native

BENCHES = Path(__file__).resolve().parents[2] / "benches"
WIDTHS = {
    "row_tiles": (10, 512),
    "few_classes": (10, 512),
    "recompute": (300, 256),
    "stored": (300, 512),
    "blas": (9, 512),
}
ROW = re.compile(r"\| ([\d,]+); ([\d,]+); ([\d,]+) \|")


@pytest.fixture
def load():
    return lambda name: importlib.import_module(f"benches.gpu.{name}")


@pytest.fixture
def model(load):
    return load("model.jobs")


@pytest.fixture
def roofline(load):
    return load("model.roofline")


@pytest.fixture
def script(load):
    return load("model.predictions")


@pytest.fixture
def built() -> None:
    if load_native("_cuda").module is None:
        pytest.skip("moso_fast._cuda, whose plans are part of the table, is not built")


@pytest.mark.generated
def test_committed_predictions_follow_the_code(script, built) -> None:
    found = script.record()
    assert script.JSON_FILE.read_text(encoding="utf-8") == script.dump(found)
    assert script.TABLE_FILE.read_text(encoding="utf-8") == script.render(found)


def test_page_shows_the_rows_that_are_timed_and_no_others(script, load) -> None:
    table = load("table")
    found = json.loads(script.JSON_FILE.read_text(encoding="utf-8"))
    page = script.TABLE_FILE.read_text(encoding="utf-8")
    assert page == script.render(found)
    asked = {(*shape, *kind) for shape in table.TABLE for kind in table.KINDS}
    names = ("n", "classes", "dim", "dtype", "precision")
    assert {tuple(row[name] for name in names) for row in found["rows"]} == asked
    jobs, kernels = page.split("## Jobs")[1].split("## Kernels")
    shown = [
        {tuple(int(n.replace(",", "")) for n in numbers) for numbers in ROW.findall(part)}
        for part in (jobs, kernels)
    ]
    assert shown == [set(table.TABLE), set(table.TABLE[:5])]
    assert page.count("\n") < 250


@pytest.mark.parametrize("regime", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_read_the_features_as_often_as_the_regime_says(model, regime, dtype) -> None:
    assert set(WIDTHS) == set(REGIMES)
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


def test_narrow_residuals_are_read_in_half_the_bytes(model) -> None:
    """bfloat16 in rows of 16 columns, where float32 ones are rows of 10."""
    shape = (50_000, 10, 512)
    for regime in ("row_tiles", "stored", "blas"):
        steps = {
            precision: model.predict_triton(shape, torch.bfloat16, precision, regime=regime).steps
            for precision in ("medium", "high")
        }
        size = {name: sum(step.bytes for step in found) for name, found in steps.items()}
        assert size["medium"] < size["high"], regime
    rows = [
        model.predict_triton(shape, torch.bfloat16, precision, regime="row_tiles").steps[0]
        for precision in ("medium", "high")
    ]
    written = [step.sweeps[0].bytes - 50_000 * (2 * 512 + 29) for step in rows]
    for found, columns in zip(written, (2 * 16, 4 * 12), strict=True):
        assert 50_000 * columns <= found < 50_000 * (columns + 3)


def test_narrow_residuals_of_cublas_are_folded_by_a_kernel(model, roofline) -> None:
    """Norms, logits, residuals, gradient sum, column sums, a product, the kernel behind it."""
    for shape, order in (((1_280_000, 1000, 2048), "H G^T"), ((65_536, 3000, 512), "R [G | gb]")):
        found = model.predict_triton(shape, torch.bfloat16, "medium", regime="blas")
        assert [step.name for step in found.steps] == [
            "norm of every row",
            "H W^T by cuBLAS",
            "softmax_residual",
            "R^T H by cuBLAS",
            "column sums of the residuals",
            f"{order} by cuBLAS",
            "row_dots",
            "rows and mean gradient, by PyTorch",
        ]
        sizes = {step.name: step.bytes for step in found.steps}
        n, classes, dim = shape
        # Residuals come in once more, with the product of rows and classes, or the features do
        # with one of rows and columns, eight columns longer.
        read = n * classes * (4 + 2) if classes <= dim else n * (dim * (4 + 2) + 8 * 4)
        assert sizes["row_dots"] == pytest.approx(read + 17 * n)
        assert found.steps[6].bound(roofline.H200) == "memory"


def test_products_of_ten_classes_are_made_with_sixteen(model) -> None:
    """Weights are padded with rows of zeros where residuals are."""
    n, dim = 1_280_000, 512
    steps = {
        classes: model.predict_triton(
            (n, classes, dim), torch.bfloat16, "medium", regime="blas"
        ).steps
        for classes in (10, 16)
    }
    for ten, sixteen in zip(steps[10][1:7], steps[16][1:7], strict=True):
        assert ten.flops == sixteen.flops, ten.name
        assert ten.bytes == pytest.approx(sixteen.bytes, rel=1e-3), ten.name


@pytest.mark.parametrize(
    "rows, batch, groups", [(3000, 10, [5]), (3000, 2, [2, 2, 1]), (3000, 1, 5 * [1]), (512, 9, [])]
)
def test_slabs_by_cublas_go_in_groups(load, roofline, monkeypatch, rows, batch, groups) -> None:
    """As ``moso_fast.backends.common.gradient_sum`` has them: five of 512 rows, and 440 more."""
    library, outline = load("model.library_steps"), load("outline").outline
    elements = 7 * 64
    monkeypatch.setattr(library, "_BATCH_BYTES", batch * 4 * elements)
    problem = outline((rows, 7, 64), torch.float32, "highest")
    found = library.LibrarySteps(problem, rows, True, roofline.H200, (3, 9))._slabs()
    if not groups:
        assert found == (4 * elements, 0.0)
        return
    adding = sum(20 if slabs == 1 else 4 * slabs + 8 + 24 for slabs in groups) + 20
    assert found == (4 * elements * 6, elements * (8 + adding))


def test_chunks_are_cut_as_on_the_gpu_that_is_predicted(model, roofline) -> None:
    assert {model._chunk_bytes(gpu) for gpu in roofline.GPUS} == {2**33}
    small = dataclasses.replace(roofline.H100, memory_bytes=39.6 * 2**30)
    assert model._chunk_bytes(small) == 2**32


def test_one_sweep_takes_the_longest_and_several_take_their_sum(roofline) -> None:
    gpu = roofline.H200
    load = roofline.Sweep(gpu.read)
    multiply = roofline.product(gpu.read / 4, gpu.flops["tf32"] / 2, "tf32")
    assert (load.seconds(gpu), load.bound(gpu)) == (1.0, "memory")
    assert (multiply.seconds(gpu), multiply.bound(gpu)) == (0.5, "products")
    both = roofline.Step("", "first", (load, multiply))
    assert both.seconds(gpu) == pytest.approx(1.5)
    assert both.bound(gpu) == "memory"
    job = roofline.Prediction("triton", "", (both, both), True, 1, 10**6)
    assert job.seconds(gpu) == pytest.approx(3.0 + 1e6 * roofline.LAUNCH_SECONDS)
    assert job.seconds(gpu, graph=False) == pytest.approx(1e6 * roofline.HOST_SECONDS)


def test_sweeps_over_logits_are_not_hidden_by_the_products(model, roofline) -> None:
    """As they were while a step took the longer of all its bytes and all its products."""
    gpu, shape = roofline.H200, (8192, 128_256, 4096)
    found = model.predict_triton(shape, torch.bfloat16, "medium")
    sweeps = [sweep for step in found.steps for sweep in step.sweeps]
    multiplying = sum(sweep.seconds(gpu) for sweep in sweeps if sweep.phases)
    plain = sum(sweep.bytes for sweep in sweeps if not sweep.phases) / gpu.read
    assert multiplying >= 3 * 2 * 8192 * 128_256 * 4096 / gpu.flops["bfloat16"]
    # At the least: two walks of the softmax, residuals of half the bytes written and summed.
    assert plain * gpu.read > 3 * 4 * 8192 * 128_256
    assert found.seconds(gpu) >= multiplying + plain
    assert found.seconds(gpu) > 38e-3


def test_mma_sync_is_dearer_than_wgmma(model, roofline, built) -> None:
    gpu, flops = roofline.H200, roofline.H200.flops["bfloat16"]
    seconds = [
        roofline.Sweep(0.0, (roofline.Phase("", flops, by=by),)).seconds(gpu)
        for by in ("HGMMA", "HMMA")
    ]
    assert seconds[0] == 1.0 and 1.5 <= seconds[1] <= 2.0
    report = json.loads((BENCHES / "results" / "triton_aot.json").read_text(encoding="utf-8"))
    newest = report[max(report)]
    shape, medium = (1_280_000, 10, 512), (torch.bfloat16, "medium")
    found = model.predict_triton(shape, *medium, regime="few_classes")
    for which, step in (("first", found.steps[0]), ("second", found.steps[2])):
        cases = [name for name in newest if re.match(rf"{which}-\d+x16x\d+-bf16-bf16-full$", name)]
        used = {phase.by for sweep in step.sweeps for phase in sweep.phases}
        assert used <= {newest[case]["sm_90"][3] for case in cases}
    rows = model.predict_triton(shape, *medium, regime="row_tiles").steps[0]
    cases = [name for name in newest if re.match(r"rows-\d+x\d+x\d+-bf16-bf16-full$", name)]
    used = {phase.by for sweep in rows.sweeps for phase in sweep.phases}
    assert used and used <= {newest[case]["sm_90"][3] for case in cases}
    found = model.predict_cuda((1_280_000, 10, 512), torch.bfloat16, "medium")
    phases = [phase for step in found.steps for sweep in step.sweeps for phase in sweep.phases]
    assert {phase.by for phase in phases if phase.flops} == {"HMMA"}


def test_a_block_on_its_own_does_one_thing_after_the_other(roofline) -> None:
    gpu = roofline.H200
    phases = (
        roofline.Phase("logits", gpu.flops["bfloat16"]),
        roofline.Phase("softmax", cycles=2 * gpu.clock, stalls=0.5),
    )

    def sweep(blocks: int | None, staged: bool, idle: float = 0.0):
        return roofline.Sweep(gpu.read, phases, blocks=blocks, staged=staged, idle=idle)

    assert sweep(None, False).seconds(gpu) == 2.0  # the longest of memory, products and issue
    assert sweep(1, True).seconds(gpu) == 1.0 + 2.5
    assert sweep(1, True, idle=0.25).seconds(gpu) == 1.0 + 2.5 + 0.25
    assert sweep(1, False).seconds(gpu) == 1.0 + 1.0 + 2.5
    assert sweep(1, False).bound(gpu) == "phases"
    assert sweep(2, False).seconds(gpu) == (1.0 + 1.0 + 2.5) / 2
    assert sweep(9, False).seconds(gpu) == 2.0
    few = roofline.Sweep(gpu.read, in_flight=gpu.read / gpu.multiprocessors * 300e-9)
    assert few.seconds(gpu) == pytest.approx(roofline.MEMORY_SECONDS / 300e-9)


def test_steps_with_one_block_are_sums(model, roofline, built) -> None:
    gpu = roofline.H200
    # 16 rows of 2,048 float32 elements beside the weights leave no room for a second stage.
    found = model.predict_cuda((1_280_000, 10, 2048), torch.float32, "high")
    (sweep,) = found.steps[0].sweeps
    assert "1 stages" in found.steps[0].note and found.steps[0].blocks == 1
    alone = [phase.alone(gpu) for phase in sweep.phases]
    assert len(alone) == 3 and min(alone) > 0
    assert sweep.seconds(gpu) == pytest.approx(sweep.memory(gpu) + sum(alone))
    # More stages: the loads are ahead of the phases, which still add up.
    found = model.predict_cuda((1_280_000, 10, 512), torch.bfloat16, "medium")
    (sweep,) = found.steps[0].sweeps
    alone = [phase.alone(gpu) for phase in sweep.phases]
    longest = max(sum(alone), sweep.memory(gpu))
    assert sweep.seconds(gpu) == pytest.approx(longest) and max(alone) < sum(alone)
    medium = torch.bfloat16, "medium"
    found = model.predict_triton((1_280_000, 10, 512), *medium, regime="few_classes")
    first, _, second, _ = found.steps
    assert first.blocks == 1 and first.bound(gpu) == "phases"
    (sweep,) = first.sweeps
    assert {phase.name for phase in sweep.phases if phase.cycles} == {
        "logits",
        "softmax",
        "gradient",
    }
    if second.blocks == 1:
        assert second.seconds(gpu) > second.bytes / gpu.read


def test_blocks_are_those_that_registers_and_shared_memory_allow(load, monkeypatch) -> None:
    occupancy, gpu = load("model.occupancy"), load("model.roofline").H200
    figures = {"3.9.0": {"wide": {"sm_90": [195, 0, 36_864, "HMMA"]},
                         "large": {"sm_90": [64, 0, 70_000, "HGMMA"]}}}  # fmt: skip
    monkeypatch.setattr(occupancy, "_figures", lambda: figures)
    tile = SimpleNamespace(num_warps=8)
    found = occupancy.fit("wide", tile, 264, gpu, (3, 9))  # 200 x 256 registers
    assert (found.blocks, found.turns, found.instruction) == (1, 2, "HMMA")
    found = occupancy.fit("large", tile, 400, gpu, (3, 9), staged=1000.0)  # 3 x 71,024 bytes
    assert (found.blocks, found.turns, found.in_flight) == (3, 6, 3000.0)


def test_h100_is_slower_where_memory_decides_and_equal_where_products_do(
    model, roofline, script
) -> None:
    def seconds(shape, dtype, precision: str, part=None) -> list[float]:
        regime = "stored" if part else None
        found = [
            (gpu, model.predict_triton(shape, dtype, precision, regime=regime, gpu=gpu))
            for gpu in roofline.GPUS
        ]
        if part is None:
            return [one.seconds(gpu) for gpu, one in found]
        steps = [(gpu, step) for gpu, one in found for step in one.steps if step.name == part]
        return [step.seconds(gpu) for gpu, step in steps]

    h200, h100 = seconds((1_280_000, 100, 512), torch.float32, "high", "norm of every row")
    assert h100 / h200 == pytest.approx(4.3 / 3.0)
    h200, h100 = seconds((1_280_000, 10, 2048), torch.bfloat16, "medium")
    assert 1.25 < h100 / h200 < 4.3 / 3.0 + 0.01
    h200, h100 = seconds((1_280_000, 1000, 2048), torch.float32, "highest", "H W^T by cuBLAS")
    assert h100 / h200 == pytest.approx(1.0, abs=0.02)
    # Between the products by cuBLAS lie sweeps, which memory decides.
    h200, h100 = seconds((1_280_000, 1000, 2048), torch.float32, "highest")
    assert 1.0 <= h100 / h200 < 1.08
    rows = json.loads(script.JSON_FILE.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert "why_not" in row or {gpu.name for gpu in roofline.GPUS} <= row.keys()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_ceilings_of_other_gpus_are_those_just_measured(
    roofline, monkeypatch, name: str, known: str | None
) -> None:
    described = SimpleNamespace(multi_processor_count=108, L2_cache_size=1, total_memory=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
    roof = {"read": 1.0, "copy": 2.0, "medium": 3.0, "high": 4.0, "highest": 5.0}
    found = roofline.measured(name, roof, torch.device("cuda"))
    if known:
        assert found is getattr(roofline, known)
    else:
        assert (found.name, found.read, found.multiprocessors) == (name, 2.0, 108)
        assert found.flops == {"bfloat16": 3.0, "tf32": 4.0, "float32": 5.0}


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


def test_contenders_are_predicted_by_their_names(model, roofline, monkeypatch) -> None:
    monkeypatch.setattr(model, "triton_version", lambda: (3, 9, 0))
    shape, gpu = (50_000, 10, 512), roofline.H200

    def seconds(name: str) -> float | None:
        return model.predicted_seconds(shape, torch.bfloat16, "medium", name, gpu)

    assert seconds("eager") is None and seconds("torch") is None
    assert 0 < seconds("triton (graph)") < seconds("triton") < seconds("triton/blas")
    passes = model.pass_seconds(shape, torch.bfloat16, "medium", "triton (graph)", gpu)
    found = model.predict_triton(shape, torch.bfloat16, "medium")
    around = [step.seconds(gpu) for step in found.steps if step.part == "around"]
    launches = roofline.LAUNCH_SECONDS * found.launches
    assert seconds("triton (graph)") == pytest.approx(sum(passes) + sum(around) + launches)
    assert min(passes) > 0 and len(around) == 1
    assert model.pass_seconds(shape, torch.bfloat16, "medium", "eager", gpu) is None
