"""Objects by their import path: what is called, and in full what is said of a wrong path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moso_fast.sources.import_path import import_object

SOURCE = """
import collections
class Data:
    size = 3
    def __call__(self):
        return "called"
def make():
    return 7
def _hidden(): pass
number, data = 5, Data()
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words_for_import.py").write_text(SOURCE)
    (tmp_path / "broken_for_import.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("words_for_import", "broken_for_import"):
        sys.modules.pop(name, None)


def test_functions_and_classes_are_called_and_other_objects_are_not(tmp_path: Path) -> None:
    path = list(sys.path)
    assert import_object("words_for_import:make", "--data") == 7
    assert sys.path == [str(tmp_path), *path], "the folder of the caller comes first, once"
    assert import_object("words_for_import:number", "--data") == 5
    assert sys.path == [str(tmp_path), *path]
    assert import_object("words_for_import:Data.size", "--data") == 3
    assert type(import_object("words_for_import:Data", "--data")).__name__ == "Data"
    assert import_object("words_for_import:data", "--data") == "called"
    kind = type(import_object("words_for_import:Data", "--data"))
    assert type(import_object("words_for_import:data", "--data", kind)) is kind


@pytest.mark.parametrize("path", ["words_for_import", ":make", "words_for_import:", ""])
def test_a_path_of_another_form(path: str) -> None:
    with pytest.raises(ValueError) as caught:
        import_object(path, "--data")
    assert str(caught.value) == (
        f"--data must be MODULE:NAME, such as training.data:train_set; got {path!r}"
    )


def test_names_that_are_not_there() -> None:
    for name in ("nothing", "nothing.size"):
        with pytest.raises(ValueError) as caught:
            import_object(f"words_for_import:{name}", "--data")
        assert str(caught.value) == (
            f"--data words_for_import:{name}: no 'nothing' in words_for_import; it has "
            "collections, Data, make, number, data"
        )
    many = "\n".join(f"n{k} = {k}" for k in range(9))
    Path("words_for_import.py").write_text(f"{many}\nclass Empty:\n    __slots__ = ()")
    sys.modules.pop("words_for_import")
    with pytest.raises(ValueError) as caught:
        import_object("words_for_import:x", "--data")
    assert str(caught.value).endswith("; it has n0, n1, n2, n3, n4, n5, n6, n7")
    with pytest.raises(ValueError) as caught:
        import_object("words_for_import:Empty.x", "--data")
    assert str(caught.value).endswith("no 'x' in words_for_import; it has nothing")


def test_modules_that_are_not_there() -> None:
    for module, missing in (
        ("nothing_of_that_name", "nothing_of_that_name"),
        ("nothing_of_that_name.part", "nothing_of_that_name"),
        ("collections.nothing", "collections.nothing"),
    ):
        with pytest.raises(ValueError) as caught:
            import_object(f"{module}:x", "--data")
        assert str(caught.value) == f"--data {module}:x: there is no module {missing!r}"
    # What a module of the caller lacks is no matter of the option.
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        import_object("broken_for_import:x", "--data")
