"""``MOSO_FAST_AUTOTUNE=1``: time the shipped tiles of a kernel on this GPU, keep the quickest.

Only tiles that are shipped, hence tested, and fit the device's shared memory are candidates. They
are timed on the first real arguments of their kind, in turn, round after round, by device events
with the cache cleared between, and the median decides. Kinds are kernel, dtypes, precision, and
C and D rounded up to powers of two. The winners lie in one JSON file per GPU, Triton version and
kernel source in the user's cache folder (``MOSO_FAST_CACHE``, else ``XDG_CACHE_HOME``/moso_fast,
else ``~/.cache/moso_fast``); a file that cannot be read is searched for anew after one warning.

A tile decides the order of some sums: results stay the same bits from run to run on one machine
and cache, not between a machine that searched and one that did not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ...util.files import atomic_path

AUTOTUNE_VARIABLE = "MOSO_FAST_AUTOTUNE"
CACHE_VARIABLE = "MOSO_FAST_CACHE"

# A Triton tile (moso_fast.kernels.tiles.Tile); named here without importing Triton.
Tile = Any
Launch = Callable[[Tile], object]
# Seconds of one launch.
Timer = Callable[[Callable[[], object]], float]

_ROUNDS = 7
# Cleared before every timed launch; larger than any L2 cache (H200: 60 MB, B200: 126 MB).
_FLUSH_BYTES = 2**28
_PAUSE_CYCLES = 2_000_000  # about a millisecond


def enabled() -> bool:
    """Whether the user has asked for a search."""
    return os.environ.get(AUTOTUNE_VARIABLE) == "1"


def tile_for(
    device: torch.device,
    key: str,
    candidates: Sequence[Tile],
    default: Tile,
    launch: Launch,
) -> Tile:
    """Return ``default``, or the quickest of ``candidates`` where the user asked for a search.

    Nothing is timed on a CPU, nor under CUDA graph capture, where nothing may wait.
    """
    if device.type != "cuda" or not enabled() or torch.cuda.is_current_stream_capturing():
        return default
    return cache_of(device).pick(key, candidates, default, launch, device_timer(device))


def kind(kernel: str, classes: int, dim: int, *labels: object) -> str:
    """Name a kind of launch; C and D in buckets of powers of two."""
    buckets = (1 << (number - 1).bit_length() for number in (classes, dim))
    return ",".join(map(str, (kernel, *buckets, *labels)))


class TileCache:
    """The winners of one GPU, Triton version and kernel source, in memory and in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Any] = _read(path)

    def pick(
        self, key: str, candidates: Sequence[Tile], default: Tile, launch: Launch, timer: Timer
    ) -> Tile:
        """Return the tile on record for ``key``, or time the candidates and record the quickest.

        ``launch`` runs the kernel with a tile, with the same result every time. A tile that the
        device refuses is passed over. ``default`` comes back untimed where it is the only one.
        """
        recorded = self._found.get(key)
        for tile in candidates:
            if recorded == _record(tile):
                return tile
        if len(candidates) < 2:
            return default
        tile = _quickest(candidates, launch, timer)
        if tile is None:
            return default
        self._found[key] = _record(tile)
        self._write()
        return tile

    def _write(self) -> None:
        """Add what this process found to the file, which others may have extended meanwhile."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # said when it was opened
                on_disk = _read(self.path)
            with atomic_path(self.path) as temporary:
                text = json.dumps({**on_disk, **self._found}, indent=1, sort_keys=True)
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            warnings.warn(
                f"the tiles found for this GPU cannot be kept ({error}); set {CACHE_VARIABLE} to "
                "a folder that can be written",
                RuntimeWarning,
                stacklevel=2,
            )


def _quickest(candidates: Sequence[Tile], launch: Launch, timer: Timer) -> Tile | None:
    from triton.errors import TritonError

    seconds: dict[int, list[float]] = {}
    for index, tile in enumerate(candidates):
        try:
            launch(tile)  # compiles
        except TritonError:  # more shared memory or registers than this device has
            continue
        seconds[index] = []
    for _ in range(_ROUNDS):
        for index, found in seconds.items():
            found.append(timer(partial(launch, candidates[index])))
    if not seconds:
        return None
    return candidates[min(seconds, key=lambda index: statistics.median(seconds[index]))]


def _record(tile: Tile) -> Any:
    """Return a tile, or a tuple that holds one, as it comes back from the file."""
    return json.loads(json.dumps(tile, default=asdict))


def _read(path: Path) -> dict[str, Any]:
    """Entries of the file; none, after a warning, where it is not what this module writes."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        _warn_unreadable(path, error)
        return {}
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not all(
            isinstance(value, (dict, list)) for value in found.values()
        ):
            raise ValueError("not a table of tiles")
    except ValueError as error:
        _warn_unreadable(path, error)
        return {}
    return found


def _warn_unreadable(path: Path, error: Exception) -> None:
    warnings.warn(
        f"{path} cannot be read ({error}); tiles are searched for again and it is replaced",
        RuntimeWarning,
        stacklevel=2,
    )


def device_timer(device: torch.device) -> Timer:
    """Return a timer by events on ``device``, with the L2 cache cleared before each launch.

    Takes no memory before it is used: most calls find their tile on record.
    """

    def seconds(work: Callable[[], object]) -> float:
        with torch.cuda.device(device):  # events are recorded on the current one
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
            torch.cuda._sleep(_PAUSE_CYCLES)  # the host launches meanwhile: not in the figure
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

    return seconds


@cache
def cache_of(device: torch.device) -> TileCache:
    """Return the cache of a CUDA device."""
    import triton

    with torch.cuda.device(device):
        name = torch.cuda.get_device_name()
    return TileCache(cache_folder() / cache_name(name, triton.__version__))


def cache_folder() -> Path:
    """Folder of this package's files in the user's cache."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moso_fast"


def cache_name(gpu: str, triton_version: str) -> str:
    """File name for a GPU, a Triton version and the kernels as they are now."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    return f"tiles-{slug}-triton-{triton_version}-{_source_hash()}.json"


@cache
def _source_hash() -> str:
    """Hash of the kernels' source, all of it: a kernel is timed as it was compiled."""
    import moso_fast.kernels.common as kernels

    digest = hashlib.sha256()
    for file in sorted(Path(str(kernels.__file__)).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
