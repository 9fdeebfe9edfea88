"""What the compiler made of the CUDA kernels, read from the built module: no GPU is needed.

ptxas' resource report and the disassembly of every kernel and architecture in moso_fast._cuda, by
the cuobjdump of the Triton wheel or of the CUDA toolkit.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from moso_fast.util.native import build_info, load_native

NAME = re.compile(
    r"(first|second)_pass_(narrow_)?kernelILNS\w*?7FeatureE(\d)ELb([01])ELi(\d+)EE"
    r"|\d([a-z_]+)_kernelE"  # every other one
)
FEATURES = {"0": 4, "1": 2, "2": 2}  # Feature of few_classes.h -> bytes of a number


class Kernel(NamedTuple):
    name: str  # "first", "narrow" (a first pass as well), "second", or what stands before _kernel
    feature: str
    exact: bool
    tiles: int  # of 16 classes


def kernel_of(mangled: str) -> Kernel | None:
    found = NAME.search(mangled)
    if found is None:
        return None
    if found[1] is None:
        return Kernel(found[6], "", False, 0)
    name = "narrow" if found[2] else found[1]
    return Kernel(name, found[3], found[4] == "1", int(found[5]))


EVERY = {
    Kernel(name, feature, exact, tiles)
    for name in ("first", "second")
    for feature in FEATURES
    for exact in (False, True)
    for tiles in (1, 2, 5, 7)
} | {
    *(Kernel(name, "", False, 0) for name in ("reduce", "finish", "judge", "score")),
    Kernel("narrow", "1", False, 1),  # 16-bit numbers that meet one term of the weights
    Kernel("narrow", "2", False, 1),
}
FIRST = ("first", "narrow")


@functools.cache
def tools() -> Path | None:
    """Folder with cuobjdump and nvdisasm, or None."""
    folders = [Path(found).parent] if (found := shutil.which("cuobjdump")) else []
    try:
        import triton
    except ImportError:
        pass
    else:
        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    return next((f for f in folders if all((f / n).is_file() for n in ("cuobjdump", "nvdisasm"))),
                None)  # fmt: skip


@pytest.fixture(scope="module")
def module():
    found = load_native("_cuda")
    if found.module is None and "_cuda" not in build_info().get("built", []):
        pytest.skip(found.reason)
    assert found.module is not None, found.reason
    if tools() is None:
        pytest.skip("cuobjdump and nvdisasm come with Triton and with the CUDA toolkit; neither is")
    return found.module


def cuobjdump(module, *arguments: str) -> str:
    folder = tools()
    assert folder is not None
    return subprocess.run(
        [folder / "cuobjdump", *arguments, module.__file__],
        env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def resources(module) -> dict[str, dict[Kernel, dict[str, int]]]:
    """architecture -> kernel -> REG, STACK, LOCAL, .."""
    table: dict[str, dict[Kernel, dict[str, int]]] = {}
    report = cuobjdump(module, "--dump-resource-usage")
    for part in re.split(r"^arch = ", report, flags=re.MULTILINE)[1:]:
        of_architecture = table.setdefault(part.split()[0], {})
        for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.*)", part):
            kernel = kernel_of(name)
            if kernel is not None:
                pairs = re.findall(r"([A-Z]+(?:\[\d\])?):(\d+)", numbers)
                of_architecture[kernel] = {key: int(value) for key, value in pairs}
    return table


def inspected() -> str:
    built = build_info()["cuda_architectures"]
    return "90a" if "90a" in built else str(built[0])


@pytest.fixture(scope="module")
def instructions(module) -> dict[Kernel, Counter[str]]:
    """SASS opcodes of every kernel for one architecture, the one nearest to sm_90."""
    arch = inspected()
    table: dict[Kernel, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in cuobjdump(module, "-sass", "-arch", f"sm_{arch}").splitlines():
        if "Function :" in line:
            kernel = kernel_of(line)
            current = Counter()
            if kernel is not None:
                table[kernel] = current
        elif found := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", line):
            current[found[1]] += 1
    return table


def test_no_kernel_spills_on_any_architecture(resources) -> None:
    for arch in build_info()["cuda_architectures"]:
        kernels = resources[f"sm_{arch}"]
        assert set(kernels) == EVERY, arch
        for kernel, used in kernels.items():
            assert used["STACK"] == used["LOCAL"] == 0, f"sm_{arch} {kernel}: {used}"


def test_registers_keep_to_the_budget(module, resources) -> None:
    for arch in build_info()["cuda_architectures"]:
        for kernel, used in resources[f"sm_{arch}"].items():
            if kernel.name == "first":
                budget = module.few_classes_first_registers
            elif kernel.name == "narrow":
                budget = module.few_classes_narrow_registers  # two blocks a multiprocessor
                assert budget * 256 * 2 <= 65536
            elif kernel.name == "second":
                budget = module.few_classes_second_registers(kernel.tiles)
            else:
                budget = 64
            assert used["REG"] <= budget, f"sm_{arch} {kernel}: {used['REG']} > {budget}"


def count(opcodes: Counter[str], pattern: str) -> int:
    return sum(n for name, n in opcodes.items() if re.fullmatch(pattern, name))


@pytest.mark.exhaustive
def test_local_memory_is_never_touched(instructions) -> None:
    assert set(instructions) == EVERY
    for kernel, opcodes in instructions.items():
        assert count(opcodes, r"(LDL|STL).*") == 0, kernel


@pytest.mark.exhaustive
def test_matrix_products_and_wide_loads_are_there(instructions) -> None:
    for kernel, opcodes in instructions.items():
        if not kernel.feature:
            continue  # no products
        assert count(opcodes, r"HMMA\.16816\.F32\.BF16") > 0, kernel
        assert count(opcodes, r"LDS\.(64|128)") > 0, kernel
        if kernel.name == "second":
            # Two batches of six or eight loads of 16 bytes: the first one, and those ahead.
            assert count(opcodes, r"LDG\.E\.NA\.128.*") >= 12, kernel
        else:
            assert count(opcodes, r"LDGSTS\.E\.BYPASS\.128.*") > 0, kernel
            # Bulk copies, and the barriers that count their bytes, from sm_90 on.
            for name in ("UBLKCP.*", r"SYNCS\.ARRIVE\.TRANS64.*", r"SYNCS\.PHASECHK\.TRANS64.*"):
                assert (count(opcodes, name) > 0) == (inspected() != "80"), f"{kernel}: {name}"
            # ldmatrix, as rows lie for the logits and transposed for the gradient; squared norms.
            for name in (r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"HMMA\.1688\.F32.*"):
                assert (count(opcodes, name) > 0) == (FEATURES[kernel.feature] == 2), kernel


@pytest.mark.exhaustive
def test_waits_are_bounded_in_debug_builds_alone(instructions) -> None:
    debug = bool(build_info().get("cuda_debug")) and inspected() != "80"  # which has no bulk copies
    for kernel, opcodes in instructions.items():
        assert (count(opcodes, r"BPT\.TRAP") > 0) == (debug and kernel.name in FIRST), kernel


@pytest.mark.exhaustive
def test_debug_builds_end_a_wait_without_end(monkeypatch, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    if not (root / "csrc" / "cuda").is_dir() or tools() is None:
        pytest.skip("needs the source tree, cuobjdump and nvdisasm")
    monkeypatch.syspath_prepend(root / "tools" / "build")
    from native_ninja import NVCC_DEBUG_FLAGS, NVCC_FLAGS
    from native_plan import find_nvcc

    nvcc, architectures, reason = find_nvcc(os.environ)
    if "90a" not in architectures:
        pytest.skip(reason or f"{nvcc} compiles no bulk copies")
    source = tmp_path / "wait.cu"
    source.write_text(
        '#include "device.cuh"\n'
        "__global__ void wait(int parity) { moso_fast::device::wait_bulk(0, parity); }\n"
    )
    for flags in ([], NVCC_DEBUG_FLAGS):
        command = [nvcc, *NVCC_FLAGS, *flags, f"-I{root / 'csrc' / 'cuda'}", "-arch=sm_90a"]
        subprocess.run([*command, "-cubin", source, "-o", tmp_path / "wait"], check=True)
        tool = [tools() / "nvdisasm", "-c", tmp_path / "wait"]
        code = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
        assert "SYNCS.PHASECHK" in code
        assert ("BPT.TRAP" in code) == bool(flags)


@pytest.mark.exhaustive
def test_no_atomic_adds(instructions) -> None:
    for kernel, opcodes in instructions.items():
        # The status word's minimum is the only atomic: it does not depend on the order.
        atomics = [name for name in opcodes if re.match(r"(ATOM|RED)(\.|G|S)", name)]
        assert all(".MIN" in name for name in atomics), f"{kernel}: {atomics}"


@pytest.mark.exhaustive
def test_second_pass_has_one_barrier(instructions) -> None:
    for kernel, opcodes in instructions.items():
        if kernel.name == "second":
            assert count(opcodes, r"BAR\.SYNC.*") == 1, kernel
