"""Reading and writing a ScoreTable: parquet, csv and npz, one column a statistic."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ._files import atomic_path, check_folder

if TYPE_CHECKING:
    from .table import ScoreTable

SUFFIXES = (".parquet", ".csv", ".npz")
VERSION = 1
_META_KEY = b"moso_fast"
_NPZ_META = "@meta"  # no column can have this name
_CSV_BLOCK_ROWS = 1 << 16

Columns = dict[str, npt.NDArray[Any]]


def save(table: ScoreTable, path: Path) -> Path:
    """Write ``table`` in the format that the suffix of ``path`` names."""
    suffix = _suffix(path)
    meta = {
        "version": VERSION,
        "higher_is_better": table.higher_is_better,
        "provenance": table.provenance,
    }
    try:
        text = json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise TypeError(f"provenance must be JSON-able: {error}") from error
    columns: Columns = {"index": table.index.numpy(), "score": table.scores.numpy()}
    columns |= {name: values.numpy() for name, values in table.metrics.items()}
    for name, values in table.per_checkpoint.items():
        columns |= {f"{name}@{k}": row.numpy() for k, row in enumerate(values)}
    check_folder(path)
    {".parquet": _save_parquet, ".csv": _save_csv, ".npz": _save_npz}[suffix](path, columns, text)
    return path


def load(path: Path) -> ScoreTable:
    """Read the table at ``path``."""
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no score table at {path}: there is no such file")
    reader = {".parquet": _load_parquet, ".csv": _load_csv, ".npz": _load_npz}[suffix]
    columns, text = reader(path)
    try:
        meta = json.loads(text)
        known = meta["version"] == VERSION
        direction, provenance = bool(meta["higher_is_better"]), dict(meta["provenance"])
    except (ValueError, TypeError, KeyError) as error:
        raise _not_a_table(path, f"its description is unreadable ({error})") from error
    if not known:
        raise _not_a_table(path, f"its version is {meta['version']}, this release reads {VERSION}")
    return _from_columns(path, columns, direction, provenance)


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"a score table is a {', '.join(SUFFIXES)} file; got {path.name!r} "
            f"(suffix {path.suffix!r})"
        )
    return path.suffix


def _from_columns(
    path: Path, columns: Columns, direction: bool, provenance: dict[str, Any]
) -> ScoreTable:
    from .table import ScoreTable

    for name in ("index", "score"):
        if name not in columns:
            raise _not_a_table(path, f"the column {name!r} is missing")
    metrics: dict[str, torch.Tensor] = {}
    checkpoints: dict[str, dict[int, torch.Tensor]] = {}
    for name, values in columns.items():
        if name in ("index", "score"):
            continue
        base, mark, number = name.partition("@")
        if not mark:
            metrics[name] = torch.from_numpy(values)
        elif number.isdecimal():
            checkpoints.setdefault(base, {})[int(number)] = torch.from_numpy(values)
        else:
            raise _not_a_table(path, f"the column {name!r} is unknown")
    for base, rows in checkpoints.items():
        if sorted(rows) != list(range(len(rows))):
            raise _not_a_table(path, f"a column of {base}@0 .. {base}@{max(rows)} is missing")
    try:
        return ScoreTable(
            scores=torch.from_numpy(columns["score"]),
            metrics=metrics,
            per_checkpoint={
                base: torch.stack([rows[k] for k in range(len(rows))])
                for base, rows in checkpoints.items()
            },
            index=torch.from_numpy(columns["index"]),
            higher_is_better=direction,
            provenance=provenance,
        )
    except (ValueError, TypeError) as error:
        raise _not_a_table(path, str(error)) from error


def _not_a_table(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is not a score table: {reason}")


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} is not a score table, or is damaged: {reason}")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            '.parquet files need pyarrow: pip install "moso-fast[table]", or use .csv or .npz'
        ) from error
    return pyarrow, pyarrow.parquet


def _save_parquet(path: Path, columns: Columns, text: str) -> None:
    arrow, parquet = _pyarrow()
    # Values without nulls: NaN stays a NaN, it does not become "missing".
    arrays = [arrow.array(values, from_pandas=False) for values in columns.values()]
    fields = [
        arrow.field(name, array.type, nullable=False)
        for name, array in zip(columns, arrays, strict=True)
    ]
    schema = arrow.schema(fields, metadata={_META_KEY: text.encode()})
    with atomic_path(path) as temporary:
        # A dictionary of floats costs time and saves nothing: nearly all values differ.
        parquet.write_table(
            arrow.Table.from_arrays(arrays, schema=schema),
            temporary,
            compression="zstd",
            use_dictionary=False,
        )


def _load_parquet(path: Path) -> tuple[Columns, str]:
    arrow, parquet = _pyarrow()
    try:
        table = parquet.read_table(path, partitioning=None)
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    text = (table.schema.metadata or {}).get(_META_KEY)
    if text is None:
        raise _not_a_table(path, "its schema carries no moso_fast entry")
    columns: Columns = {}
    for name in table.column_names:
        values = table.column(name)
        if values.null_count or not _is_number(values.type, arrow):
            raise _not_a_table(path, f"the column {name!r} holds {values.type} or missing values")
        columns[name] = np.array(values.to_numpy())  # a writable copy that owns its memory
    return columns, text.decode()


def _is_number(kind: Any, arrow: Any) -> bool:
    return kind in (arrow.int64(), arrow.float32(), arrow.float64())


def _save_npz(path: Path, columns: Columns, text: str) -> None:
    # Not np.savez: it takes the columns as keyword arguments, and cannot have one named "file".
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, values in {_NPZ_META: np.array(text), **columns}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)


def _load_npz(path: Path) -> tuple[Columns, str]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    meta = columns.pop(_NPZ_META, None)
    if meta is None or meta.dtype.kind != "U":
        raise _not_a_table(path, f"the entry {_NPZ_META!r} is missing")
    for name, values in columns.items():
        if values.dtype.kind not in "fi" or values.ndim != 1:
            raise _not_a_table(path, f"the entry {name!r} is no column of numbers")
    return columns, str(meta)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def _save_csv(path: Path, columns: Columns, text: str) -> None:
    # 9 and 17 significant digits bring every float32 and float64 back bitwise; the shortest
    # float32 text would not, since readers round twice on the way through float64.
    digits = {"int64": "%d", "float32": "%.9g", "float64": "%.17g"}
    line = ",".join(digits[values.dtype.name] for values in columns.values()) + "\n"
    rows = len(columns["index"])
    with atomic_path(path) as temporary:
        with temporary.open("w", encoding="ascii", newline="") as file:
            file.write(",".join(columns) + "\n")
            for start in range(0, rows, _CSV_BLOCK_ROWS):
                block = [v[start : start + _CSV_BLOCK_ROWS].tolist() for v in columns.values()]
                file.writelines(line % values for values in zip(*block, strict=True))
        description = {
            **json.loads(text),
            "dtypes": {name: values.dtype.name for name, values in columns.items()},
            "sha256": _digest(temporary),
        }
        # The description goes first: a stop between the two leaves a pair that load() refuses.
        with atomic_path(_sidecar(path)) as beside:
            beside.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _load_csv(path: Path) -> tuple[Columns, str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names = file.readline().strip().split(",")
            empty = not file.readline().strip()
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from error
    for name in ("index", "score"):
        if name not in names:
            raise _not_a_table(path, f"the column {name!r} is missing")
    if len(set(names)) != len(names):
        raise _not_a_table(path, "a column stands there twice")
    text, dtypes = _csv_description(path)
    kinds = [(name, "i8" if name == "index" else "f8") for name in names]
    if empty:
        data = np.empty(0, dtype=kinds)
    else:
        try:
            data = np.loadtxt(path, dtype=kinds, delimiter=",", skiprows=1, ndmin=1, comments=None)
        except ValueError as error:
            raise _damaged(path, error) from error
    dtypes = {name: dtypes.get(name, "float32") for name in names} | {"index": "int64"}
    return {name: data[name].astype(dtypes[name]) for name in names}, text


def _csv_description(path: Path) -> tuple[str, dict[str, str]]:
    """Text and dtypes of the file beside a .csv; defaults where there is none."""
    beside = _sidecar(path)
    if not beside.is_file():
        plain = {"version": VERSION, "higher_is_better": True, "provenance": {}}
        return json.dumps(plain), {}
    try:
        description = json.loads(beside.read_text(encoding="utf-8"))
        dtypes = {str(name): str(kind) for name, kind in description.pop("dtypes").items()}
        digest = description.pop("sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise _damaged(beside, error) from error
    if not set(dtypes.values()) <= {"int64", "float32", "float64"}:
        raise _not_a_table(beside, f"unknown dtypes {sorted(set(dtypes.values()))}")
    if digest != _digest(path):
        raise ValueError(
            f"{path} has changed since {beside.name} was written beside it; "
            "delete that file to read the numbers without their origin"
        )
    return json.dumps(description), dtypes
