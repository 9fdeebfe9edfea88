"""No instruction set's code in another's place: what csrc/cpu/simd/target-inl.h promises.

The kernels are compiled once per instruction set and one set is chosen at run time. Of equal
inline functions the linker keeps one copy for the whole module: one that was compiled with AVX-512
kills an older processor by an illegal instruction, wherever it is called from.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moso_fast.util.native import load_native

ROOT = Path(__file__).resolve().parents[3]
CPU = ROOT / "csrc" / "cpu"
SIMD = CPU / "simd"
X86 = platform.machine() in ("x86_64", "AMD64")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", *AVX2]
# By the suffix of a translation unit's name, as in the build.
FLAGS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "amx": ["-mamx-tile", "-mamx-bf16", *AVX512],
}
LANES = {"baseline": 4, "avx2": 8, "avx512": 16, "amx": 16}

# What the kernels may call of the standard library: C functions, and types without functions.
STANDARD = {
    *("memcpy", "memset", "exp", "log1p"),  # of double, which are the C library's
    *("integer_sequence", "make_integer_sequence", "is_same", "numeric_limits"),
}


def compiler() -> list[str]:
    if not SIMD.is_dir():
        pytest.skip("needs the source tree")
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        pytest.skip("needs a C++ compiler")
    return command


def compile_text(variant: str, text: str, *options: str) -> None:
    command = [*compiler(), "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{CPU}"]
    command += ["-DMOSO_FAST_X86=1", *FLAGS[variant]] if X86 else []
    command += [f"-DMOSO_FAST_VARIANT={variant}", f"-DVL={LANES[variant]}", *options]
    done = subprocess.run(
        [*command, "-x", "c++", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}{done.stderr}"


def inline_files() -> list[Path]:
    return sorted(SIMD.glob("*-inl.h"))


@pytest.mark.exhaustive
def test_each_file_includes_what_it_needs() -> None:
    assert len(inline_files()) > 10
    for file in inline_files():
        compile_text("baseline", f'#include "simd/{file.name}"\n', "-fsyntax-only")
        if X86 and ("BF16" in file.read_text(encoding="utf-8")):
            compile_text("amx", f'#include "simd/{file.name}"\n', "-fsyntax-only")


@pytest.mark.exhaustive
def test_their_order_does_not_matter() -> None:
    for variant in ("baseline", "amx") if X86 else ("baseline",):
        lines = [f'#include "simd/{file.name}"\n' for file in reversed(inline_files())]
        compile_text(variant, "".join(lines), "-fsyntax-only")


def test_they_use_nothing_inline_of_the_standard_library() -> None:
    for file in inline_files():
        code = re.sub(r"//.*", "", file.read_text(encoding="utf-8"))
        names = set(re.findall(r"\bstd::(\w+)", code))
        assert names <= STANDARD, f"{file.name}: {names - STANDARD}; see target-inl.h"


def weak_functions(object_file: Path) -> list[str]:
    lines = subprocess.run(
        ["nm", object_file], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [line.split()[-1] for line in lines if " W " in line]


@pytest.mark.exhaustive
@pytest.mark.skipif(not X86, reason="other processors have one instruction set")
@pytest.mark.parametrize("variant", ["baseline", "avx512", "amx"])
def test_inline_functions_are_of_their_instruction_set(tmp_path: Path, variant: str) -> None:
    """Unoptimised, every inline function that is called is there to be merged."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm of binutils")
    own = re.compile(rf"_Z[A-Z]*9moso_fast{len(variant)}{variant}")
    sources = sorted(CPU.glob(f"*_{variant}.cpp"))
    assert sources
    for source in sources:
        out = tmp_path / f"{source.stem}.o"
        command = [*compiler(), "-std=c++17", "-fPIC", "-O0", f"-I{CPU}", "-DMOSO_FAST_X86=1"]
        subprocess.run([*command, *FLAGS[variant], "-c", source, "-o", out], check=True)
        found = weak_functions(out)
        assert "classes" not in source.stem or found, "nothing was looked at"
        assert [name for name in found if not own.match(name)] == [], source.name


INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\t(\S+)(.*)$")
SYMBOL = re.compile(r"^[0-9a-f]+ <(\S+)>:$")
# The namespace of a variant's kernels, or its entry point.
OWNER = re.compile(
    r"^_Z[A-Z]*9moso_fast(?:\d+(baseline|avx2|avx512|amx)[A-Z0-9]|\d+variant_(\w+?)Ev)"
)
SETS = {"baseline": 0, "avx2": 1, "avx512": 2, "amx": 3}


def instruction_set(name: str, operands: str) -> int:
    """Return the least of SETS that has this instruction."""
    if name.startswith(("tile", "tdp", "ldtile", "sttile")):
        return 3
    if re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])|\{1to", operands):
        return 2
    return int(bool(re.match(r"v(?!err|erw|mcall)", name)))


def instructions() -> Iterator[tuple[str, str, str]]:
    """Yield every instruction of the built module: its function, its name and its operands."""
    built = load_native("_cpu").module
    if built is None or not X86:
        pytest.skip("moso_fast._cpu is not built here, or has one instruction set")
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump of binutils")
    command = ["objdump", "-d", "--no-show-raw-insn", built.__file__]
    symbol = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if (found := SYMBOL.match(line)) is not None:
                symbol = found[1]
            elif (found := INSTRUCTION.match(line)) is not None:
                yield symbol, found[1], found[2]
    assert running.returncode == 0


def test_the_built_module_keeps_instruction_sets_apart() -> None:
    most: dict[str, int] = {}
    for symbol, name, operands in instructions():
        most[symbol] = max(most.get(symbol, 0), instruction_set(name, operands))
    owners = {symbol: OWNER.match(symbol) for symbol in most}
    seen: set[int] = set()
    for symbol, needed in most.items():
        owner = owners[symbol]
        allowed = SETS[owner[1] or owner[2]] if owner else 0
        assert needed <= allowed, f"{symbol} has instructions of {list(SETS)[needed]}"
        seen.add(needed)
    if not any(owners.values()):
        pytest.skip("the module's local symbols were stripped")
    assert {1, 2} <= seen


def test_register_tiles_stay_in_registers() -> None:
    """A vector of a product's inner loop that lies on the stack costs a third of the speed."""
    products: dict[str, int] = {}
    for symbol, name, operands in instructions():
        if "multiply_store" in symbol and name.startswith("vfmadd"):
            products[symbol] = products.get(symbol, 0) + ("(%rsp)" in operands)
    if not products:
        pytest.skip("the module's local symbols were stripped")
    assert len(products) > 50
    assert [symbol for symbol, spilled in products.items() if spilled] == []
