"""Measures several cases into one results file, so that what was measured survives an end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import facts, store
from .cases import Case
from .runner import Settings, add_memory, measure_case

__all__ = ["MEASURES", "Session", "check_device", "given_threads", "results_path", "wrong_results"]

# Everything, the times alone, or the memory of what has its times already.
MEASURES = ("all", "time", "memory")


class Session:
    """A run of the benchmarks on this machine, and the file that it adds to.

    Parameters
    ----------
    path
        The results file; its folder is made. What it holds of other cases stays in it.
    profile
        ``"small"`` or ``"full"``.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    measure
        One of :data:`MEASURES`.
    registry
        Module that lists the providers; see :func:`.providers.registered`.
    tick
        Called with a caption before each stage.
    """

    def __init__(
        self,
        path: Path,
        profile: str,
        device: str = "cpu",
        measure: str = "all",
        registry: str = "moso_fast.bench.providers",
        tick: Callable[[str], None] = lambda _: None,
    ) -> None:
        options: dict[str, Any] = {"memory_limit": 0.0} if measure == "time" else {}
        self.settings = Settings.of_profile(profile, device=device, registry=registry, **options)
        self.machine = facts.machine(device)
        self.path, self.tick = path, tick
        self._only_memory = measure == "memory"

    def check(self, cases: Iterable[Case]) -> None:
        """Look before measuring whether the file can take these cases.

        Raises
        ------
        ValueError
            The file is no results file or another machine's; or only memory is asked for, and the
            file has no times of a case.
        """
        old = self._load()
        store.merge(old, self._results({"cases": {}}), self.path)
        for case in cases if self._only_memory else ():
            if old is None or case.name not in old["cases"]:
                raise ValueError(
                    f"--measure memory: {self.path} has no times of {case.name}; measure all or "
                    "time first"
                )

    def measure(self, case: Case) -> dict[str, Any]:
        """Measure one case that passed :meth:`check`, add it to the file, return its record."""
        if self._only_memory:
            record: dict[str, Any] = store.load(self.path)["cases"][case.name]
            add_memory(case, record, self.settings, self.tick)
        else:
            record = measure_case(case, self.settings, tick=self.tick)
        self.keep({"cases": {case.name: record}})
        return record

    def keep(self, part: Mapping[str, Any]) -> None:
        """Add ``part``, which has ``"cases"`` and may have ``"growth"``, to the file now."""
        store.save(store.merge(self._load(), self._results(part), self.path), self.path)

    def _load(self) -> dict[str, Any] | None:
        return store.load(self.path) if self.path.exists() else None

    def _results(self, part: Mapping[str, Any]) -> dict[str, Any]:
        profile = self.settings.profile
        return {"schema": store.SCHEMA, "profile": profile, "machine": self.machine, **part}


@contextmanager
def given_threads(count: int | None) -> Iterator[None]:
    """Have PyTorch use ``count`` threads meanwhile; None: as many as it does."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def results_path(out: Path | None, profile: str, device: str = "cpu") -> Path:
    """Return the results file in ``out``, else in a folder that is named after this machine.

    That folder lies in ``benches/results`` where the working directory is a source tree, and in
    ``moso_fast_bench`` elsewhere.
    """
    if out is None:
        tree = Path("benches", "results")
        folder = tree if tree.is_dir() else Path("moso_fast_bench")
        out = folder / facts.machine_name(facts.machine(device))
    return out / f"{profile}.json"


def check_device(device: str) -> None:
    """Raise ValueError unless this machine has the device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch sees no CUDA device here")


def wrong_results(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name the results of moso_fast that failed their check: case, provider and what is wrong."""
    return [
        f"{name}, {row['provider']}: {row['problem']}"
        for name, record in records.items()
        for row in record["rows"]
        if row["family"] == "ours" and row["problem"]
    ]
