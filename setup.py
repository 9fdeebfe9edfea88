"""Build of moso_fast: the Python packages, and native modules compiled through ninja.

tools/build/native_plan.py decides what is built (MOSO_FAST_BUILD), native_ninja.py builds it.
What was built, and why the rest was not, is recorded in moso_fast/_build_info.json.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools" / "build"))

from native_ninja import Ninja, add_cpu, add_cuda  # noqa: E402 (found through the line above)
from native_plan import (  # noqa: E402 (likewise)
    INFO_NAME,
    BuildError,
    make_plan,
    wheel_to_pass_on,
    write_info,
)

PLAN = make_plan(os.environ, pass_on=wheel_to_pass_on(sys.argv, os.environ))


def say(message: str) -> None:
    """Tell the builder something on stderr (pip shows it with -v, or when the build fails)."""
    print(f"moso_fast: {message}", file=sys.stderr, flush=True)


class BuildPython(build_py):
    """Copies the packages, without what an earlier build left behind, and the build record."""

    def run(self) -> None:
        """Build the Python part."""
        if PLAN.error:
            raise BuildError(PLAN.error)
        if not PLAN.modules:
            say(f"installing pure Python, slower on a CPU: {PLAN.missing['_cpu']}")
        if self.editable_mode:
            clear_in_place()
            # Before the data files are collected: a strict editable install links this one.
            write_info(PLAN, ROOT / "moso_fast")
            super().run()
            return
        built = Path(self.build_lib, "moso_fast")
        shutil.rmtree(built, ignore_errors=True)
        super().run()
        write_info(PLAN, built)


class BuildNative(build_ext):
    """Builds the native modules with ninja in place of distutils' compiler classes."""

    def run(self) -> None:
        """Build what the plan names, in the build folder or in place."""
        if PLAN.error:
            raise BuildError(PLAN.error)
        if self.inplace:
            clear_in_place()
        super().run()
        for module, reason in PLAN.missing.items():
            say(f"moso_fast.{module} is left out: {reason}")
        folder = ROOT if self.inplace else Path(self.build_lib)
        if (folder / "moso_fast").is_dir():  # absent when build_ext is run alone
            write_info(PLAN, folder / "moso_fast")

    def build_extensions(self) -> None:
        """Build the modules in one run and put each where setuptools expects it."""
        # Not build_temp: editable installs get an empty one each time and would start over.
        folder = f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        ninja = Ninja(ROOT / "build" / folder)
        # The CUDA files take longest: begun first, they leave no core idle at the end.
        if "_cuda" in PLAN.modules:
            add_cuda(ninja, PLAN, ROOT / "csrc" / "cuda")
        add_cpu(ninja, PLAN, ROOT / "csrc" / "cpu")
        ninja.write()
        optional = [name for name in PLAN.modules if name not in PLAN.required]
        failed, words = ninja.run(PLAN.required, optional)
        for module in sorted(failed):
            self._fail(module, words)
        for extension in list(self.extensions):
            module = extension.name.rpartition(".")[2]
            if module in failed:
                self.extensions.remove(extension)
                continue
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ninja.folder / f"{module}.so", target)

    def _fail(self, module: str, words: str) -> None:
        """Raise, or, for a CUDA module that nobody asked for by name, go on without it."""
        if module == "_cpu":
            raise BuildError(
                f"the C++ build with `{shlex.join(PLAN.cxx)}` failed, see above; "
                "MOSO_FAST_BUILD=none installs pure Python"
            )
        if module in PLAN.required:
            raise BuildError(f"the CUDA build with {PLAN.nvcc} failed, see above")
        errors = [line.strip() for line in words.splitlines() if "error" in line.lower()]
        last = errors[-1] if errors else "no message"
        PLAN.missing[module] = f"the CUDA build with {PLAN.nvcc} failed at installation: {last}"


def clear_in_place() -> None:
    """Remove this Python's native modules from the tree that the plan leaves out."""
    for module in PLAN.missing:
        name = f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
        (ROOT / "moso_fast" / name).unlink(missing_ok=True)


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["moso_fast", "moso_fast.*"]), "moso_fast.kernels"],
        # kernels/ has no __init__.py: with one, the repository root on sys.path would shadow
        # Hugging Face's `kernels` package.
        package_dir={"moso_fast.kernels": "kernels"},
        package_data={"moso_fast": ["py.typed", INFO_NAME]},
        ext_modules=[Extension(f"moso_fast.{name}", sources=[]) for name in PLAN.modules],
        cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
    )
