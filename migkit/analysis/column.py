"""What the tables of the schema are made of: columns with a dtype, a meaning and choices."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

SIDES = ("source", "destination")


@dataclass(frozen=True)
class Column:
    """One column: its dtype as pandas writes it, its meaning, and the choices of a ``category``."""

    dtype: str
    doc: str
    choices: tuple[str, ...] = ()

    def make(self, data: object = ()) -> pd.Series:
        """Return data as a column of this dtype."""
        if self.choices:
            return pd.Series(pd.Categorical(data, categories=list(self.choices)))  # type: ignore[call-overload]
        return pd.Series(data, dtype=self.dtype)


@dataclass(frozen=True)
class Table:
    """One frame: what a row is, and its columns in order."""

    row: str
    columns: dict[str, Column] = field(default_factory=dict)
