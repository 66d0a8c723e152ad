"""Arrays that are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Rows = npt.NDArray[np.void]


class LazyArrays(Mapping[str, Rows]):
    """Arrays by name, each made once, by a function of its own."""

    def __init__(self, makers: Mapping[str, Callable[[], Rows]]) -> None:
        """Take the functions; none is called yet."""
        self._makers = dict(makers)
        self._made: dict[str, Rows] = {}

    def __getitem__(self, name: str) -> Rows:
        """Return an array; KeyError if there is none of that name."""
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether there is one, without making it."""
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._makers)

    def __len__(self) -> int:
        """Count the names."""
        return len(self._makers)
