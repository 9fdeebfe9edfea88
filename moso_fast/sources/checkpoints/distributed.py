"""Folders of torch.distributed.checkpoint (FSDP, torchtitan), read without a process group.

Their index is a pickle and so are their entries that are no tensors: both are read here by
readers that run no code (see `pickled`); torch puts the shards together.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path, PurePath
from typing import Any

import torch

from .pickled import load

INDEX = ".metadata"
_INDEX_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")


class _IndexReader(pickle.Unpickler):
    """Builds what torch's index is made of, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a data class of torch's index, a dtype or a size."""
        known = {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) in known:
            return known[(module, name)]
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePath  # where the folder lay when it was written; not looked at
        if module in _INDEX_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")


def read_distributed(folder: Path, with_tensors: bool = True) -> dict[str, Any]:
    """Return what the folder holds as nested dictionaries, as it was given to be saved.

    Without ``with_tensors``, tensors have shapes and no values: learning rates alone are wanted.

    Raises
    ------
    ValueError
        An index or a shard that is damaged or missing.
    """
    if not torch.distributed.is_available():
        raise ValueError(f"checkpoint folder {folder} needs a torch with torch.distributed")
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

    try:
        with (folder / INDEX).open("rb") as file:
            index = _IndexReader(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, OSError) as error:
        raise ValueError(f"checkpoint {folder / INDEX} cannot be read: {error}") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"checkpoint {folder / INDEX} is no index of torch.distributed.checkpoint")

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return index

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            self.state_dict[read_item.dest_index.fqn] = load(value)

    flat: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            flat[name] = None
        elif with_tensors:
            flat[name] = torch.zeros(entry.size, dtype=entry.properties.dtype, device="cpu")
        else:
            shapes[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    if flat:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for
                load_distributed(
                    flat,
                    storage_reader=Reader(folder),
                    planner=Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    no_dist=True,
                )
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
            # torch wraps whatever went wrong into one error for all ranks.
            lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
            raise ValueError(f"checkpoint folder {folder} cannot be read: {lines[-1]}") from error
    return _nested({**flat, **shapes}, index.planner_data or {})


def _nested(flat: dict[str, Any], paths: Any) -> dict[str, Any]:
    """Undo the flattening: `paths` gives the keys on the way to each entry."""
    result: dict[str, Any] = {}
    for name, value in flat.items():
        path = paths.get(name) if isinstance(paths, dict) else None
        keys = [str(key) for key in path] if isinstance(path, (tuple, list)) and path else [name]
        node = result
        for key in keys[:-1]:
            inner = node.setdefault(key, {})
            if not isinstance(inner, dict):
                keys = [name]
                node = result
                break
            node = inner
        node[keys[-1]] = value
    return result
