"""Writes and runs build.ninja for the native modules.

Also read from the environment: CXXFLAGS and LDFLAGS (appended), NVCC_CCBIN or CUDAHOSTCXX
(the compiler under nvcc), MAX_JOBS.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from native_gpu import output_of
from native_plan import BuildError, Plan, gencode_flags, ptx_architecture

CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-math-errno", "-pthread"),
]
# No -march=native: a file is compiled for the instruction set in its name and chosen at run time.
AVX512_BF16 = "-mavx512bf16"
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AMX_FLAGS = ["-mamx-tile", "-mamx-bf16"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", AVX512_BF16, *AVX2_FLAGS]
# Intel's processors from Skylake to Cascade Lake decode a loop anew each time round where one of
# its jumps touches a 32-byte boundary (the "Jump Conditional Code" erratum). Assemblers keep jumps
# clear of them: GNU's by the first spelling, clang's by the second.
JUMPS_WITHIN_BOUNDARIES = [
    "-Wa,-mbranches-within-32B-boundaries",
    "-mbranches-within-32B-boundaries",
]
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "-cudart=static", "-Xptxas=-warn-spills"),
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]
NVCC_DEBUG_FLAGS = ["-DMOSO_FAST_BOUNDED_WAITS", "-lineinfo"]


class Ninja:
    """One build.ninja, in which every file's command is spelled out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = [
            "ninja_required_version = 1.8",
            "rule compile",
            "  command = $cmd -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $tool $in",
            "rule link",
            "  command = $cmd $in -o $out $libs",
            "  description = link $out",
        ]

    def compile(self, source: Path, command: Sequence[str]) -> str:
        """Add one object file; return its path relative to the build folder."""
        out = f"{source.parent.name}/{source.name}.o"
        values = {"cmd": shlex.join(command), "tool": Path(command[0]).name}
        self._edge("compile", out, [str(source)], values)
        return out

    def link(self, out: str, objects: Sequence[str], command: Sequence[str]) -> None:
        """Add one shared library; $LDFLAGS come last."""
        libs = shlex.join(shlex.split(os.environ.get("LDFLAGS", "")))
        self._edge("link", out, objects, {"cmd": shlex.join(command), "libs": libs})

    def _edge(self, rule: str, out: str, inputs: Sequence[str], values: Mapping[str, str]) -> None:
        def path(text: str) -> str:
            return re.sub(r"([$ :])", r"$\1", text)

        self._lines.append(f"build {path(out)}: {rule} {' '.join(map(path, inputs))}")
        self._lines += [f"  {key} = {value.replace('$', '$$')}" for key, value in values.items()]

    def write(self) -> None:
        """Write build.ninja."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(self._lines) + "\n"
        (self.folder / "build.ninja").write_text(text, encoding="utf-8")

    def run(self, required: Sequence[str], optional: Sequence[str] = ()) -> tuple[set[str], str]:
        """Build modules in one run, so that no core waits between two of them.

        Parameters
        ----------
        required : sequence of str
            Modules without which nothing else matters: the first error ends the run.
        optional : sequence of str
            Modules that may fail: with any, the run goes on with the others after an error.

        Returns
        -------
        failed : set of str
            The modules in which there were errors.
        words : str
            What ninja and the compilers said; it has been printed.
        """
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not jobs.isdigit():
            raise BuildError(f"MAX_JOBS={jobs!r} is not a number")
        command = [ninja_program(), "-C", str(self.folder)]
        command += ["-j", jobs] if jobs else []
        command += ["-k", "0"] if optional else []
        done = subprocess.run(
            [*command, *(f"{module}.so" for module in (*required, *optional))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        print(done.stdout, end="", file=sys.stderr, flush=True)
        # "FAILED: [code=1] cpu/a.cpp.o"; before ninja 1.13 without the code. An object lies in the
        # folder of its module, see compile().
        outputs = re.findall(r"^FAILED: (?:\[code=-?\d+\] )?(\S+)", done.stdout, re.MULTILINE)
        failed = {f"_{Path(out).parts[0]}" if "/" in out else Path(out).stem for out in outputs}
        if done.returncode and not failed:
            raise BuildError(f"ninja ended with exit code {done.returncode}, see above")
        return failed, done.stdout


def ninja_program() -> str:
    """Return the ninja of the Python package, else the one on PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("ninja is missing; run `pip install ninja`") from None
        return found
    return str(Path(ninja.BIN_DIR, "ninja"))


def binding_includes() -> list[str]:
    """Return the include flags of bindings*.cpp; no other file sees Python or pybind11."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing; run `pip install pybind11`") from None
    paths = sysconfig.get_paths()
    folders = dict.fromkeys([pybind11.get_include(), paths["include"], paths["platinclude"]])
    return [f"-I{folder}" for folder in folders]


def add_cpu(ninja: Ninja, plan: Plan, folder: Path) -> None:
    """Add _cpu.so: every *.cpp of the folder, SIMD flags by file name (_avx2, _avx512, _amx)."""
    # The compiler is asked, not the machine: it may be a cross compiler.
    macros = output_of([*plan.cxx, "-dM", "-E", "-x", "c++", os.devnull]) or ""
    x86 = "#define __x86_64__ 1" in macros
    flags = [*CXX_FLAGS, f"-I{folder}"]
    by_name: dict[str, list[str] | None] = {"avx2": None, "avx512": None, "amx": None}
    if x86:

        def known(*options: str) -> bool:
            return output_of([*plan.cxx, *options, "-E", "-x", "c++", os.devnull]) is not None

        flags.append("-DMOSO_FAST_X86=1")
        by_name.update(avx2=AVX2_FLAGS, avx512=AVX512_FLAGS, amx=[*AMX_FLAGS, *AVX512_FLAGS])
        if not known(AVX512_BF16):  # g++ before 10, clang before 9
            by_name["avx512"] = [flag for flag in AVX512_FLAGS if flag != AVX512_BF16]
            flags.append("-DMOSO_FAST_NO_AVX512BF16=1")
        if not known(*AMX_FLAGS, AVX512_BF16):  # g++ before 11, clang before 11
            by_name["amx"] = None
            flags.append("-DMOSO_FAST_NO_AMX=1")
        flags += jump_flags(plan.cxx)
    objects = []
    # AVX-512's have the most kernels and take longest: begun first, they leave no core idle.
    sources = sorted(folder.glob("*.cpp"), key=lambda file: ("_avx512" not in file.name, file.name))
    for source in sources:
        own: list[str] | None = []
        if source.name.startswith("bindings"):
            own = binding_includes()
        else:
            own = by_name.get(source.stem.rpartition("_")[2], [])
        if own is None:
            continue
        objects.append(ninja.compile(source, [*plan.cxx, *flags, *own, *user_flags()]))
    ninja.link("_cpu.so", objects, [*plan.cxx, *shared_flags(), "-pthread"])


def jump_flags(cxx: Sequence[str]) -> list[str]:
    """Return the spelling of JUMPS_WITHIN_BOUNDARIES that the compiler assembles with, if any."""
    # Not to os.devnull: an assembler may delete its output when it fails.
    with tempfile.TemporaryDirectory() as folder:
        for flag in JUMPS_WITHIN_BOUNDARIES:
            out = str(Path(folder, "empty.o"))
            if output_of([*cxx, flag, "-c", "-x", "c++", os.devnull, "-o", out]) is not None:
                return [flag]
    return []


def add_cuda(ninja: Ninja, plan: Plan, folder: Path) -> None:
    """Add _cuda.so: nvcc for *.cu, the C++ compiler for *.cpp, cudart linked statically."""
    names = [f"sm_{arch}" for arch in plan.cuda_architectures]
    names.append(f"compute_{ptx_architecture(plan.cuda_architectures)}")
    define = f'-DMOSO_FAST_CUDA_ARCHITECTURES="{" ".join(names)}"'
    # nvcc refuses host compilers newer than itself: its usual variables name another one.
    host = os.environ.get("NVCC_CCBIN") or os.environ.get("CUDAHOSTCXX")
    nvcc = [plan.nvcc, "-ccbin", host or host_compiler(plan.cxx)]
    flags = [*NVCC_FLAGS, *(NVCC_DEBUG_FLAGS if plan.cuda_debug else [])]
    cuda = [*nvcc, *flags, f"-I{folder}", *gencode_flags(plan.cuda_architectures)]
    cxx = [*plan.cxx, *CXX_FLAGS, f"-I{folder}", *binding_includes(), define, *user_flags()]
    objects = [ninja.compile(source, cuda) for source in sorted(folder.glob("*.cu"))]
    objects += [ninja.compile(source, cxx) for source in sorted(folder.glob("*.cpp"))]
    ninja.link("_cuda.so", objects, [*nvcc, "-shared", "-cudart=static"])


def host_compiler(cxx: Sequence[str]) -> str:
    """Return the program of a compiler command without a cache in front of it."""
    wrapped = Path(cxx[0]).name in ("ccache", "sccache", "distcc") and len(cxx) > 1
    return cxx[1] if wrapped else cxx[0]


def user_flags() -> list[str]:
    """Return $CXXFLAGS."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def shared_flags() -> list[str]:
    """Return the flags that make a Python extension of objects."""
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    return ["-shared"]
