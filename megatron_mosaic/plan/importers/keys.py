"""Values of a foreign description, by key: read with care, refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.yaml_text import MAX_COUNT


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A mapping and what it is called in messages; `defaults` stand for keys that it leaves out."""

    where: str
    data: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, where: str, data: object, defaults: Mapping[str, Any] | None = None) -> Keys:
        if not isinstance(data, Mapping):
            raise ConfigError(where, got=type(data).__name__, expected="keys with values", fix="correct the file")
        return cls(where=where, data=data, defaults=defaults or {})

    def inner(self, key: str, defaults: Mapping[str, Any] | None = None) -> Keys:
        """The mapping under a key."""
        return Keys.of(f"{self.where}: {key}", self.data.get(key, {}), defaults)

    def has(self, key: str) -> bool:
        return self.value(key) is not None

    def value(self, key: str) -> Any:
        found = self.data.get(key)
        return self.defaults.get(key) if found is None else found

    def text(self, key: str) -> str:
        return str(self.value(key) or "")

    def flag(self, key: str, default: bool) -> bool:
        found = self.value(key)
        if found is None:
            return default
        if not isinstance(found, bool):
            raise ConfigError(f"{self.where}: {key}", got=repr(found)[:60], expected="true or false", fix="correct it")
        return found

    def number(self, key: str, default: float) -> float:
        """A number above 0, and not so large or small that nothing real has it."""
        found = self.value(key)
        if found is None:
            return default
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if not is_number or not 1 / MAX_COUNT <= found <= MAX_COUNT:
            raise ConfigError(
                f"{self.where}: {key}", got=repr(found)[:60], expected=f"a number above 0, up to {MAX_COUNT}",
                fix="correct it",
            )  # fmt: skip
        return float(found)

    def count(self, *names: str, default: int | None = None, least: int = 0) -> int:
        """A count of at least so much under the first of the names that is there. ConfigError without one or a
        default."""
        for name in names:
            found = self.value(name)
            if found is None:
                continue
            if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= MAX_COUNT:
                raise ConfigError(
                    f"{self.where}: {name}", got=repr(found)[:60], expected=f"a whole number, {least} to {MAX_COUNT}",
                    fix="correct it",
                )  # fmt: skip
            return found
        if default is None:
            raise ConfigError(
                f"{self.where}: {names[0]}", got="nothing", expected="a number", fix=f"add {' or '.join(names)}"
            )
        return default

    def first(self, key: str) -> int:
        """A count, or the first of a list of them ([height, width])."""
        found = self.value(key)
        if isinstance(found, list) and found:
            return Keys(where=self.where, data={key: found[0]}, defaults={}).count(key)
        return self.count(key)
