"""What every config block is, and numbers as YAML writes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A config block: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def whole(value: Any) -> Any:
    """`6.0e9` and `"6e9"` (YAML 1.1 reads an exponent without sign as text) are whole numbers too."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
