"""Reading what torch.save wrote without running code from it, whatever lies beside the weights.

Training scripts save their arguments (argparse.Namespace), numpy numbers, paths, configurations
or the whole model beside the weights. ``torch.load(weights_only=True)`` refuses a file for any of
them. Here every class or function that such a file names is replaced by a stand-in of our own,
which keeps what it is given and does nothing: tensors come through torch's own restricted reader,
and nothing that the file names is imported or called.
"""

from __future__ import annotations

import collections
import pickle
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

# Pickles before the object itself in a file of the old, unzipped form: a magic number, the
# protocol and facts about the machine.
_OLD_FORM_HEADERS = 3


class StandIn:
    """An object of a class that the file names; keeps what the pickle hands to it."""

    path = ""  # module and name of what it stands for
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Any:
        """Keep ``arguments``."""
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)  # an Enum may be the key of a dictionary


def load(source: Path | BinaryIO, mmap: bool = False) -> Any:
    """Read an object that torch.save wrote: tensors on the CPU, unknown objects as `StandIn`.

    Parameters
    ----------
    source
        File or binary stream.
    mmap
        Leave tensors in the file until they are used, where it has the form for it.

    Raises
    ------
    pickle.UnpicklingError
        More than stand-ins can take up, such as an object that calls what another call returned.
    RuntimeError, OSError, EOFError, ValueError, ...
        As torch.load does for a file that is damaged.
    """
    zipped = isinstance(source, Path) and zipfile.is_zipfile(source)
    names = [] if _plain(source) else _named(source)
    bases: dict[str, type] = dict.fromkeys(names, object)
    while True:
        stand_ins = {path: _stand_in(path, base) for path, base in bases.items()}
        if not isinstance(source, Path):
            source.seek(0)
        try:
            # Our entries are taken out again by the same pairs: what the user allowed stays.
            with torch.serialization.safe_globals([(cls, path) for path, cls in stand_ins.items()]):
                return torch.load(
                    source, map_location="cpu", weights_only=True, mmap=(mmap and zipped) or None
                )
        except (pickle.UnpicklingError, TypeError) as error:
            # Subclasses of dict and list are filled item by item, which torch's reader does for
            # the plain types alone. Its message names the class that it could not fill; torch 2.9
            # lets Python say so of a dict, by a TypeError.
            text = str(error)
            refused = [path for path, cls in stand_ins.items() if cls.__name__ in text]
            if len(refused) != 1 or bases[refused[0]] is not object:
                raise
            bases[refused[0]] = list if " lists" in text else dict


def _stand_in(path: str, base: type) -> type:
    if base is dict:

        class Filled(StandIn):
            def __new__(cls, *arguments: Any) -> Any:
                given = arguments[0] if arguments else ()
                # defaultdict is given its factory, other subclasses their items or nothing.
                items = given if isinstance(given, (Mapping, list)) else ()
                return collections.OrderedDict(items)

    elif base is list:

        class Filled(StandIn):  # type: ignore[no-redef]
            def __new__(cls, *arguments: Any) -> Any:
                given = arguments[0] if arguments else ()
                return list(given) if isinstance(given, (list, tuple)) else []

    else:

        class Filled(StandIn):  # type: ignore[no-redef]
            pass

    # The name makes the class known in a message of torch's reader.
    return type(f"StandIn<{path}>", (Filled,), {"path": path})


def _plain(source: Path | BinaryIO) -> bool:
    """Tell whether the file names nothing but what torch allows by itself."""
    if not isinstance(source, Path) or not zipfile.is_zipfile(source):
        return False
    try:
        return not torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError):
        return False  # `torch.load` says what is wrong


def _named(source: Path | BinaryIO) -> list[str]:
    """Names of classes and functions in the pickle, as torch's reader looks them up."""
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                return _named_in(file)
        return _named_in(source)
    except (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile):
        return []  # `torch.load` says what is wrong with the file


def _named_in(file: BinaryIO) -> list[str]:
    found: dict[str, None] = {}
    file.seek(0)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    _collect(pickletools.genops(archive.read(name)), found)
    else:
        file.seek(0)
        for _ in range(_OLD_FORM_HEADERS + 1):
            _collect(pickletools.genops(file), found)
    return list(found)


def _collect(operations: Iterable[Any], found: dict[str, None]) -> None:
    for operation, argument, _ in operations:
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # Files of Python 2 use its names; torch's reader translates them as pickle does.
            if (module, name) in NAME_MAPPING:
                module, name = NAME_MAPPING[(module, name)]
            elif module in IMPORT_MAPPING:
                module = IMPORT_MAPPING[module]
            found[f"{module}.{name}"] = None


def plain_value(value: Any) -> Any:
    """Return numbers and paths that numpy and pathlib stand-ins hold; other values as they are.

    A numpy number comes as a Python number, an array of numbers as a tensor.
    """
    if not isinstance(value, StandIn):
        return value
    if value.path.endswith("multiarray.scalar") and len(value.arguments) == 2:
        array = _numbers(value.arguments[0], value.arguments[1], ())
        return value if array is None else array.item()
    if value.path.endswith("multiarray._reconstruct") and isinstance(value.state, tuple):
        if len(value.state) != 5:
            return value
        _, shape, dtype, fortran, content = value.state
        array = _numbers(dtype, content, tuple(shape), "F" if fortran else "C")
        return value if array is None else torch.from_numpy(array.copy())
    return value


def _numbers(
    dtype: Any, content: Any, shape: tuple[int, ...], order: Literal["C", "F"] = "C"
) -> Any:
    """Array of the bytes of a numpy pickle, where they are plain numbers; else None."""
    if not isinstance(dtype, StandIn) or dtype.path != "numpy.dtype":
        return None
    if not isinstance(content, bytes) or not dtype.arguments:
        return None
    kind = str(dtype.arguments[0])
    other_order = isinstance(dtype.state, tuple) and len(dtype.state) > 1 and dtype.state[1] == ">"
    if kind[:1] not in "fiub" or not kind[1:].isdigit() or other_order:
        return None
    return np.frombuffer(content, dtype="<" + kind).reshape(shape, order=order)


def module_state(value: Any) -> dict[str, Any] | None:
    """State dict of a network that was pickled whole; None where ``value`` is no such thing.

    Its parameters and persistent buffers are where `torch.nn.Module` keeps them, by the names that
    its ``state_dict()`` would have.
    """
    if not isinstance(value, StandIn) or not isinstance(value.state, Mapping):
        return None
    parts = [value.state.get(key) for key in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(part, Mapping) for part in parts):
        return None
    parameters, buffers, modules = parts
    passing = value.state.get("_non_persistent_buffers_set", ())
    result: dict[str, Any] = {}
    for name, tensor in (*parameters.items(), *buffers.items()):  # type: ignore[union-attr]
        if tensor is not None and name not in passing:
            result[name] = tensor
    for name, child in modules.items():  # type: ignore[union-attr]
        if child is None:
            continue
        inner = module_state(child)
        if inner is None:
            return None
        result.update({f"{name}.{key}": tensor for key, tensor in inner.items()})
    return result
