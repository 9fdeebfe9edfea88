"""Errors about the data that carry the place and the value they speak of."""

from __future__ import annotations

from typing import Any


class DataError(ValueError):
    """A row of the data that cannot be scored, in one line.

    Whoever scores rows of a larger whole raises :meth:`moved` of it: the number moves, and the
    text follows.

    Parameters
    ----------
    text
        The message, with ``{row}``, ``{column}`` and ``{value}`` where these belong.
    row
        Which row of the data as they were handed over.
    column
        Which column of that row, where it is one.
    value
        What was found there.
    """

    def __init__(
        self, text: str, *, row: int, column: int | None = None, value: float | None = None
    ) -> None:
        super().__init__(text, row, column, value)
        self.text, self.row, self.column, self.value = text, row, column, value

    def __str__(self) -> str:
        return self.text.format(row=self.row, column=self.column, value=self.value)

    def __repr__(self) -> str:
        return f"DataError({str(self)!r})"

    def __reduce__(self) -> Any:  # exceptions are copied by their positional arguments
        return _remade, self.args

    def moved(self, row: int, where: str = "") -> DataError:
        """Return this error about ``row`` of a larger whole, with ``where`` before the text."""
        text = where.replace("{", "{{").replace("}", "}}") + self.text
        return DataError(text, row=row, column=self.column, value=self.value)


def _remade(text: str, row: int, column: int | None, value: float | None) -> DataError:
    return DataError(text, row=row, column=column, value=value)
