"""Compile Triton kernels without a GPU and read what they use: registers, spills, shared memory.

``python tests/support/aot.py`` prints the table for every case.

A Triton kernel reports registers and spills only where a device loads it. The assembler and
``cuobjdump`` in the Triton wheel tell the same from the cubin, for any architecture.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from moso_fast.kernels.elementwise_residual import elementwise_residual_kernel
from moso_fast.kernels.residual import (
    ELEMENTWISE_CONFIGS,
    IDS_CONFIGS,
    NARROW_CONFIGS,
    SOFT_CONFIGS,
    RowConfig,
)
from moso_fast.kernels.softmax_residual import softmax_residual_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs, and its code."""

    registers: int  # a thread
    stack: int  # bytes a thread: spills and arrays in local memory
    shared: int  # bytes a block, static and dynamic
    ttgir: str
    ptx: str
    cubin: bytes


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int = 3,
    divisible: tuple[str, ...] = (),
) -> Resources:
    """Compile ``kernel`` for sm_``arch``.

    ``types`` maps run-time arguments to Triton type names (``"*fp32"``, ``"i64"``); ``constants``
    the rest to values (None for an absent pointer). ``divisible`` names the arguments known to be
    multiples of 16, as Triton infers from the values at launch.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = set(kernel.arg_names) - set(types) - set(constants)
    if missing:
        raise ValueError(f"neither type nor value given for {sorted(missing)}")
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs={position[name]: value for name, value in constants.items()},
            attrs={position[name]: [["tt.divisibility", 16]] for name in divisible},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    registers, stack, static_shared = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers,
        stack,
        max(static_shared, compiled.metadata.shared),
        compiled.asm["ttgir"],
        compiled.asm["ptx"],
        compiled.asm["cubin"],
    )


@functools.cache
def cuobjdump() -> Path:
    """Return the ``cuobjdump`` that comes with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _resource_usage(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    if len(found) != 1:
        raise RuntimeError(f"expected one function in cuobjdump's report, got:\n{report}")
    registers, stack, shared, local = map(int, found[0])
    return registers, stack + local, shared


@dataclass(frozen=True)
class Case:
    """One variant of a kernel under one configuration."""

    name: str
    kernel: Any
    config: RowConfig
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]

    def compile(self, arch: int) -> Resources:
        """Compile for sm_``arch``."""
        return compile_kernel(
            self.kernel,
            self.types,
            self.constants,
            arch=arch,
            num_warps=self.config.num_warps,
            divisible=self.divisible,
        )


_OUTPUTS = ("loss", "residual_sqnorm", "margin", "entropy")
_COUNTS = ("items", "first_row", "row_stride", "target_stride", "head_stride")


def residual_case(
    kernel: Any, config: RowConfig, *, plain: bool, narrow: bool = False, **constants: bool
) -> Case:
    """Build a case of a residual kernel.

    ``plain``: one head, aligned contiguous rows, no weights, mask or smoothing, 32-bit strides.
    Otherwise everything at once: three heads, odd C, any 64-bit stride, weights, mask, smoothing.
    ``narrow``: residuals of one head go to a matrix of their own, and the bias is added.
    """
    targets = "*fp32" if constants.get("SOFT", True) else "*i64"
    types = dict.fromkeys(("logits", *_OUTPUTS), "*fp32") | {"labels": targets, "status": "*i64"}
    types |= dict.fromkeys(_COUNTS, "i32" if plain else "i64")
    if "SOFT" in constants:
        types |= {"ignore_index": "i32", "smoothing": "fp32"}
        constants["SMOOTH"] = not plain
    else:
        types["targets"] = types.pop("labels")
    values: dict[str, Any] = {
        **constants,
        "HEADS": 1 if plain or narrow else 3,
        "CLASSES": (config.max_classes or 128256) - (not plain),
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_CLASSES": config.block_classes,
        "CONTIGUOUS": plain,
    }
    if narrow:
        types |= {"bias": "*fp32", "narrow": "*bf16", "lost": "*fp32"}
        columns = 8 * -(-values["CLASSES"] // 8)
        walked = config.block_classes * -(-values["CLASSES"] // config.block_classes)
        values["COLUMNS"] = min(columns, walked)
    elif "SOFT" in constants:
        values |= dict.fromkeys(("bias", "narrow", "lost")) | {"COLUMNS": 0}
    optional = {"sample_weight": "*fp32", "counted": "*i1"}
    state = ("softmax_top", "softmax_log_sum", "label_residual")
    if "SOFT" in constants and not constants["SOFT"] and not narrow:
        optional |= dict.fromkeys(state, "*fp32")
    elif "SOFT" in constants:
        values |= dict.fromkeys(state)
    if plain:
        values |= dict.fromkeys(optional)
    else:
        types |= optional
    aligned = tuple(name for name, kind in types.items() if kind.startswith("*"))
    if plain:
        aligned += ("row_stride", "target_stride")
    if narrow:  # rows of logits are padded
        aligned += ("row_stride",)
    plainest = "IDS" if "SOFT" in constants else "MSE"
    flags = ",".join(name for name, value in constants.items() if value) or plainest
    limit = config.max_classes or "any"
    variant = "plain" if plain else "narrow" if narrow else "full"
    name = f"{kernel.__name__}-C{limit}-{flags}-{variant}"
    return Case(name, kernel, config, types, values, aligned)


def residual_cases() -> list[Case]:
    """Every configuration of the residual kernels, in its plainest and its fullest variants."""
    cases = []
    for soft in (False, True):
        for config in NARROW_CONFIGS:
            kernel = softmax_residual_kernel
            cases.append(residual_case(kernel, config, plain=False, narrow=True, SOFT=soft))
    for plain in (False, True):
        for soft, configs in ((False, IDS_CONFIGS), (True, SOFT_CONFIGS)):
            for config in configs:
                cases.append(residual_case(softmax_residual_kernel, config, plain=plain, SOFT=soft))
        for binary in (False, True):
            for config in ELEMENTWISE_CONFIGS:
                cases.append(
                    residual_case(elementwise_residual_kernel, config, plain=plain, BINARY=binary)
                )
    return cases


def main() -> None:
    """Print registers, stack and shared memory of every case on every architecture."""
    heads = "".join(f"{f'sm_{arch} reg/stack/smem':>26}" for arch in ARCHITECTURES)
    print(f"{'case':<58}{'tile':>10} warps{heads}")
    for case in residual_cases():
        tile = f"{case.config.block_rows}x{case.config.block_classes}"
        cells = ""
        for arch in ARCHITECTURES:
            used = case.compile(arch)
            cells += f"{f'{used.registers}/{used.stack}/{used.shared}':>26}"
        print(f"{case.name:<58}{tile:>10}{case.config.num_warps:>6}{cells}", flush=True)


if __name__ == "__main__":
    main()
