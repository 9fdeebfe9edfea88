"""What setup.py builds: which native modules, with which compilers, and why the rest is left out.

The native modules do not know torch, so compilers and wishes are all that decides.
MOSO_FAST_BUILD says what is wanted:

auto   (default) moso_fast._cpu where a C++ compiler is found; moso_fast._cuda where nvcc is found
       too and the machine has a GPU, for that GPU alone: CUDA takes most of an installation.
       A wheel that is built to be passed on has it for every GPU
none   pure Python
cpu    moso_fast._cpu, or an error
cuda   moso_fast._cpu and, for every GPU, moso_fast._cuda, or an error
all    every native module, or an error: at present the same as cuda

MOSO_FAST_CUDA_ARCHITECTURES ("80 90a", or "all") says for which GPUs, also where there is none.
MOSO_FAST_CUDA_DEBUG=1 has kernels that wait for bytes which never come end with an error after
seconds instead of hanging, and keeps line numbers for profilers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from native_gpu import architecture_of, capabilities, output_of

MODULES = ("_cpu", "_cuda")
REQUIRED: dict[str, tuple[str, ...]] = {
    "auto": (),
    "none": (),
    "cpu": ("_cpu",),
    "cuda": ("_cpu", "_cuda"),
    "all": MODULES,
}
INFO_NAME = "_build_info.json"
# Binary code for A100, H100/H200 and B200, and PTX of the newest. The backend offers its kernels
# only where there is binary code; with the PTX the module's probe runs on later devices too.
CUDA_ARCHITECTURES = ("80", "90a", "100")
# Where NVIDIA's installers put nvcc: not every image has it on PATH.
NVCC_FOLDER = "/usr/local/cuda/bin"


class BuildError(SystemExit):
    """Ends the build with one line on stderr and no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"moso_fast: error: {message}")


@dataclass
class Plan:
    """What to build, with which compilers, and why the rest is left out."""

    mode: str
    cxx: list[str] = field(default_factory=list)
    nvcc: str = ""
    cuda_architectures: list[str] = field(default_factory=list)
    cuda_debug: bool = False
    missing: dict[str, str] = field(default_factory=dict)  # module name -> why
    error: str = ""  # why an explicit choice cannot be met; raised once something is to be built

    @property
    def modules(self) -> list[str]:
        """Names of the native modules to build."""
        return [name for name in MODULES if name not in self.missing and not self.error]

    @property
    def required(self) -> list[str]:
        """Names of those without which the build has failed: C++, and what was asked for."""
        return [name for name in self.modules if name == "_cpu" or name in REQUIRED[self.mode]]


def wheel_to_pass_on(argv: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether setup.py's arguments build a wheel for other machines than this one.

    pip and uv build a wheel too when they install from source; both leave their mark in the
    environment. `pip wheel` and `uv build` look the same: there MOSO_FAST_BUILD=all asks for it.
    """
    installers = ("PIP_BUILD_TRACKER", "PIP_REQ_TRACKER", "UV")  # the second: pip before 22.1
    return "bdist_wheel" in argv and not any(env.get(name) for name in installers)


def make_plan(env: Mapping[str, str], pass_on: bool = False) -> Plan:
    """Decide what to build from MOSO_FAST_BUILD and the compilers and GPUs that are found.

    Parameters
    ----------
    env : mapping
        The environment.
    pass_on : bool
        Whether the modules are for other machines too: then this one's GPUs do not matter.
    """
    plan = Plan(mode=env.get("MOSO_FAST_BUILD", "").strip().lower() or "auto")
    if plan.mode not in REQUIRED:
        plan.error = f"MOSO_FAST_BUILD={plan.mode!r} is not one of {', '.join(REQUIRED)}"
        return plan
    if plan.mode == "none":
        plan.missing = dict.fromkeys(MODULES, "it was installed with MOSO_FAST_BUILD=none")
        return plan

    plan.cxx, reason = find_cxx(env)
    if not plan.cxx:
        plan.missing = dict.fromkeys(MODULES, reason)
        if env.get("CXX", "").strip():  # an explicit choice, in every mode
            plan.error = reason
            return plan
    elif plan.mode == "cpu":
        plan.missing["_cuda"] = "it was installed with MOSO_FAST_BUILD=cpu"
    else:
        plan.nvcc, plan.cuda_architectures, reason = find_nvcc(env)
        plan.cuda_debug = env.get("MOSO_FAST_CUDA_DEBUG", "").strip() not in ("", "0")
        names = env.get("MOSO_FAST_CUDA_ARCHITECTURES", "").strip()
        if not reason and names:  # an explicit choice
            plan.error = restrict_architectures(plan, names)
            if plan.error:
                return plan
        elif not reason and plan.mode == "auto" and not pass_on:
            reason = choose_own_architectures(plan, capabilities(env, plan.nvcc))
        if reason:
            plan.missing["_cuda"] = reason

    unmet = [plan.missing[name] for name in REQUIRED[plan.mode] if name in plan.missing]
    if "_cuda" in REQUIRED[plan.mode] and not plan.cxx:
        unmet[0] += ", and nvcc needs it too"
    if unmet:
        plan.error = f"MOSO_FAST_BUILD={plan.mode} cannot be met: {unmet[0]}"
    return plan


def find_cxx(env: Mapping[str, str]) -> tuple[list[str], str]:
    """Return the C++ compiler's command ($CXX, else c++, g++, clang++), or why there is none."""
    if os.name == "nt":
        return [], "the native modules cannot be built on Windows yet"
    path = env.get("PATH", os.defpath)
    command = shlex.split(env.get("CXX", ""))
    if command:
        if shutil.which(command[0], path=path):
            return command, ""
        return [], f"CXX names {command[0]!r}, which cannot be found; correct or unset it"
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name, path=path)
        if found:
            return [found], ""
    return [], "no C++ compiler was found at installation (looked for $CXX, c++, g++, clang++)"


def find_nvcc(env: Mapping[str, str]) -> tuple[str, list[str], str]:
    """Return the first nvcc of the usual places and its architectures, or why there is none."""
    folders = [str(Path(env[key], "bin")) for key in ("CUDA_HOME", "CUDA_PATH") if env.get(key)]
    search = os.pathsep.join([*folders, env.get("PATH", os.defpath), NVCC_FOLDER])
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None:
        looked = f"$CUDA_HOME/bin, $CUDA_PATH/bin, PATH, {NVCC_FOLDER}"
        return "", [], f"nvcc was not found at installation (looked in {looked})"
    codes = output_of([nvcc, "--list-gpu-code"])
    if codes is None:
        return nvcc, [], f"`{nvcc} --list-gpu-code` failed at installation"
    architectures = supported_architectures(codes)
    if not architectures:
        wanted = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHITECTURES)
        return nvcc, [], f"{nvcc} supports none of {wanted}"
    return nvcc, architectures, ""


def supported_architectures(gpu_codes: str) -> list[str]:
    """Return those of CUDA_ARCHITECTURES that ``nvcc --list-gpu-code`` names.

    nvcc lists sm_90 and not sm_90a, but accepts sm_90a from CUDA 12.0 on.
    """
    listed = set(re.findall(r"sm_(\d+)", gpu_codes))
    return [arch for arch in CUDA_ARCHITECTURES if arch.rstrip("a") in listed]


def restrict_architectures(plan: Plan, names: str) -> str:
    """Keep the named architectures of the plan; return what is wrong with the names, or ""."""
    if names.lower() == "all":
        return ""
    wanted = re.split(r"[\s,;]+", names.strip())
    unknown = [name for name in wanted if name not in plan.cuda_architectures]
    if unknown:
        known = " ".join([*plan.cuda_architectures, "all"])
        return f"MOSO_FAST_CUDA_ARCHITECTURES names {unknown[0]!r}, which is not one of {known}"
    plan.cuda_architectures = [arch for arch in plan.cuda_architectures if arch in wanted]
    return ""


def choose_own_architectures(plan: Plan, of_machine: Sequence[str]) -> str:
    """Keep what this machine's GPUs run; return why that is nothing, or ""."""
    if not of_machine:
        return (
            "it was left out at installation, where nvcc was found but no GPU: "
            "its kernels take minutes to compile"
        )
    names = ", ".join(f"sm_{capability}" for capability in of_machine)
    own = {architecture_of(capability, CUDA_ARCHITECTURES) for capability in of_machine} - {None}
    if not own:
        known = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHITECTURES)
        return f"its kernels are for {known}, and this machine's GPU is {names}"
    kept = [arch for arch in plan.cuda_architectures if arch in own]
    if not kept:
        return f"{plan.nvcc} is too old for this machine's GPU, {names}"
    plan.cuda_architectures = kept
    return ""


def ptx_architecture(architectures: Sequence[str]) -> str:
    """Return the newest architecture without its 'a', whose PTX would run on no other device."""
    return architectures[-1].rstrip("a")


def gencode_flags(architectures: Sequence[str]) -> list[str]:
    """Return nvcc's flags: binary code for each architecture and PTX of the newest one."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    newest = ptx_architecture(architectures)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def write_info(plan: Plan, folder: Path) -> None:
    """Record what was built, and why the rest was not, for moso_fast/util/native.py."""
    cxx = (output_of([*plan.cxx, "--version"]) or "") if plan.cxx else ""
    record = {
        "mode": plan.mode,
        "built": plan.modules,
        "missing": plan.missing,
        "cxx": cxx.partition("\n")[0],
        "nvcc": plan.nvcc,
        "cuda_architectures": plan.cuda_architectures if "_cuda" in plan.modules else [],
        "cuda_debug": plan.cuda_debug and "_cuda" in plan.modules,
    }
    temporary = folder / f"{INFO_NAME}.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / INFO_NAME)
