"""A mapping that cannot change and can be hashed: what frozen values hold instead of a dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping


class FrozenMap[K, V](Mapping[K, V]):
    """Keys in the order they came in, which counts where two of these are compared (as with OrderedDict), and not
    against a dict. The hash, kept in `_hash`, is worked out once. Dicts among the values are frozen too."""

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[K, V] | Iterable[tuple[K, V]] = ()) -> None:
        self._items: dict[K, V] = {key: _frozen(value) for key, value in dict(items).items()}
        self._hash = 0  # 0: not asked for yet

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenMap):
            return self is other or list(self._items.items()) == list(other._items.items())
        return self._items == other

    def __hash__(self) -> int:
        """Counts on hashable values."""
        self._hash = self._hash or hash(tuple(self._items.items())) or 1
        return self._hash

    def __repr__(self) -> str:
        return repr(self._items)


def _frozen[V](value: V) -> V:
    return FrozenMap(value) if isinstance(value, dict) else value  # type: ignore[return-value]
