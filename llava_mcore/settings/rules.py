"""What the parts of the schema have in common. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=False, validate_default=True)

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def fail_on(problems: list[str]) -> None:
    """Has pydantic report all problems, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))
