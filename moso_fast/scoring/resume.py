"""Results of finished checkpoints in a folder, so that a killed run can go on."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..util.files import atomic_path
from .parts import FIELDS, PartStats

FORMAT = 1
_FACTS = ("digests", "labels", "precision", "feature_dtype", "shift", "notes")


@dataclass(frozen=True)
class Group:
    """Statistics of consecutive checkpoints, from number ``first``, that were scored in one call.

    ``digests`` names the values of each checkpoint, ``labels`` those of the labels; the
    statistics do not depend on formula, learning rate or combination.
    """

    first: int
    digests: list[str]
    labels: str
    precision: str
    feature_dtype: str
    shift: str  # of `LabelShift.stored`
    notes: str  # json, of what lies behind the head
    stats: PartStats

    @property
    def end(self) -> int:
        """Number of the first checkpoint after the group."""
        return self.first + len(self.digests)


class ResultStore:
    """A folder with one ``group_*.npz`` for every finished group and a ``manifest.json``.

    Raises
    ------
    ValueError
        The folder holds results of a run with other settings (the message says which), or is no
        such folder.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        # Through JSON and back, so that what is compared has the types of what was stored.
        wanted = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
        manifest = self.folder / "manifest.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"resume: {self.folder} is a file, not a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        results = any(self.folder.glob("group_*.npz"))
        if results and not manifest.exists():
            raise ValueError(f"resume: {self.folder} holds group_*.npz but no manifest.json")
        if results:
            self._compare(manifest, wanted)
            return
        # Also over the manifest of a run that ended before its first result, whose numbers of the
        # samples go first: beside the new manifest they would be taken for those of this run.
        (self.folder / "index.npy").unlink(missing_ok=True)
        with atomic_path(manifest) as path:
            path.write_text(json.dumps(wanted, indent=1), encoding="utf-8")

    def _compare(self, manifest: Path, wanted: dict[str, Any]) -> None:
        try:
            stored = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            stored = None
        if not isinstance(stored, dict):
            raise ValueError(f"resume: {manifest} is not a manifest of an earlier run")
        differing = [
            f"{name} was {stored.get(name)!r} and is now {wanted.get(name)!r}"
            for name in dict.fromkeys((*wanted, *stored))
            if stored.get(name) != wanted.get(name)
        ]
        if differing:
            raise ValueError(
                f"resume: {self.folder} belongs to a different run: {'; '.join(differing)}"
            )

    def load(self, first: int) -> Group | None:
        """Return the group that begins at checkpoint ``first``, if it was finished."""
        path = self._path(first)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as content:
                about = json.loads(str(content["about"]))
                arrays = {name: torch.from_numpy(content[name]) for name in FIELDS}
            stats = PartStats(
                {name: arrays[name][k] for name in FIELDS} for k in range(len(about["digests"]))
            )
            stats.backend = about["backend"]
            stats.counts = {int(part): n for part, n in about["counts"]}
            stats.mean_grad_sqnorm = {int(part): v for part, v in about["mean_grad_sqnorm"]}
            facts = {name: about[name] for name in _FACTS}
            return Group(first=first, stats=stats, **facts)
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise ValueError(f"resume: {path} is damaged; delete it to compute it again") from error

    def save(self, group: Group) -> None:
        """Write a finished group, whole or not at all."""
        stats = group.stats
        about = {
            **{name: getattr(group, name) for name in _FACTS},
            "backend": stats.backend,
            "counts": list(stats.counts.items()),
            "mean_grad_sqnorm": list(stats.mean_grad_sqnorm.items()),
        }
        arrays = {name: _stacked(stats, name).numpy() for name in FIELDS}
        with atomic_path(self._path(group.first)) as path, path.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]

    def save_index(self, index: Tensor) -> None:
        """Write the numbers (N,) that the data give their samples, for a run that reads no data."""
        with atomic_path(self.folder / "index.npy") as path, path.open("wb") as file:
            np.save(file, index.numpy())

    def load_index(self) -> Tensor | None:
        """Return what `save_index` wrote, None where the data give no numbers."""
        path = self.folder / "index.npy"
        if not path.exists():
            return None
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"resume: {path} is damaged; delete the folder to start anew"
            ) from error

    def beyond(self, count: int) -> list[str]:
        """Names of the stored groups that begin at checkpoint ``count`` or later."""
        numbers = (
            int(path.stem.removeprefix("group_")) for path in self.folder.glob("group_*.npz")
        )
        return [self._path(number).name for number in sorted(numbers) if number >= count]

    def _path(self, first: int) -> Path:
        return self.folder / f"group_{first:05d}.npz"


def _stacked(stats: PartStats, name: str) -> Tensor:
    return torch.stack([one[name] for one in stats])
