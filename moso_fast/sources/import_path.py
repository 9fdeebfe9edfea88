"""Python objects by their import path, for programs that are told of models and data in words."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def import_object(path: str, option: str, finished: type | None = None) -> Any:
    """Import ``package.module:name`` and call it where it is a function or a class.

    Parameters
    ----------
    path
        Import path; the current folder comes first, as for ``python -m``.
    option
        For messages.
    finished
        Instances of this type are callable and yet not called.

    Raises
    ------
    ValueError
        Not of that form, no such module, no such name in it.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"{option} must be MODULE:NAME, such as training.data:train_set; got {path!r}"
        )
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's module imports is missing: that is not about the option.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{option} {path}: there is no module {error.name!r}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            public = [word for word in vars(value) if not word.startswith("_")]
            known = ", ".join(public[:8]) or "nothing"
            raise ValueError(f"{option} {path}: no {part!r} in {module_name}; it has {known}")
        value = getattr(value, part)
    if finished is not None and isinstance(value, finished):
        return value
    return value() if callable(value) else value
