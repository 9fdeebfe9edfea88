"""Score tables as .parquet: described in the schema, or as pandas and polars leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..util.files import atomic_path
from .content import DIRECTION, NAMELESS, Columns, Content, check_names, damaged, not_a_table

_META_KEY = b"moso_fast"


def save_parquet(path: Path, columns: Columns, text: str) -> None:
    """Write ``columns``, and ``text`` into the schema."""
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


def load_parquet(path: Path) -> Content:
    """Read a .parquet file; its description is None where somebody else wrote it."""
    arrow, parquet = _pyarrow()
    try:
        table = parquet.read_table(path, partitioning=None)
    except (arrow.ArrowException, OSError) as error:
        raise damaged(path, error) from error
    metadata = table.schema.metadata or {}
    text = metadata.get(_META_KEY)
    if "index" not in table.column_names:
        counted = _range_of_pandas(metadata.get(b"pandas"), table.num_rows)
        if counted is not None:
            table = table.append_column("index", arrow.array(counted, arrow.int64()))
    # Where our description is, nobody has renamed a column: a name is one, whatever it looks like.
    nameless = [n for n in table.column_names if text is None and NAMELESS.fullmatch(n)]
    check_names(
        path,
        [name for name in table.column_names if name not in nameless],
        nameless,
        "its schema carries no moso_fast entry and " if text is None else "",
    )
    content = Content({}, None if text is None else text.decode())
    for name in table.column_names:
        if name in nameless:
            continue
        values = table.column(name)
        if name == "index":
            content.columns[name] = _index(path, values, arrow)
        elif name == DIRECTION and arrow.types.is_boolean(values.type):
            # Through integers: NumPy has no missing bool.
            content.columns[name] = values.cast(arrow.int8()).cast(arrow.float64()).to_numpy()
        elif _is_number(values.type, arrow):
            # pandas writes NaN as a missing value; a copy is writable and owns its memory.
            single = values.type in (arrow.float16(), arrow.float32())
            kind = arrow.float32() if single else arrow.float64()
            content.columns[name] = np.array(values.cast(kind, safe=False).to_numpy())
        elif name in ("score", DIRECTION) or "@" in name:
            raise not_a_table(path, f"the column {name!r} holds {values.type}, no numbers")
        else:
            content.notes.append(f"the column {name!r} holds {values.type} and was left out")
    return content


def _range_of_pandas(notes: bytes | None, rows: int) -> range | None:
    """Return the index that pandas keeps as a range in its notes, not as a column, or None."""
    try:
        entries = json.loads(notes or b"{}")["index_columns"]
        for entry in entries:
            if isinstance(entry, dict) and (entry["kind"], entry["name"]) == ("range", "index"):
                found = range(entry["start"], entry["stop"], entry["step"])
                return found if len(found) == rows else None  # else rows were left out since
    except (KeyError, TypeError, ValueError):
        pass  # not what pandas writes: then there is no index
    return None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            '.parquet files need pyarrow: pip install "moso-fast[table]", or use .csv or .npz'
        ) from error
    return pyarrow, pyarrow.parquet


def _is_number(kind: Any, arrow: Any) -> bool:
    types = arrow.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _index(path: Path, values: Any, arrow: Any) -> npt.NDArray[Any]:
    """Whole numbers, also where pandas has made them float64 on the way."""
    if values.null_count or not _is_number(values.type, arrow):
        raise not_a_table(path, f"the index holds {values.type} or missing values, no integers")
    try:
        return np.array(values.cast(arrow.int64()).to_numpy())
    except arrow.ArrowInvalid as error:
        raise not_a_table(path, f"the index holds no whole numbers: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
