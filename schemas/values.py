"""Types of single values that settings share: numbers with an end, and names that a file or the hub can have."""

from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")
NotEmpty = Annotated[list[T], Field(min_length=1)]

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 1e12
"""No setting is larger, whatever it counts: beyond it float32 sums and 32-bit counts of the libraries break."""
MAX_NAME_BYTES = 255
"""Of a file or folder, on Linux."""

AnyInt = Annotated[int, Field(ge=-LARGEST_INT, le=LARGEST_INT)]
AnyFloat = Annotated[float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
CountingInt = Annotated[int, Field(ge=0, le=LARGEST_INT)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST_FLOAT)]
NotNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST_FLOAT)]
ShareFloat = Annotated[float, Field(ge=0, le=1)]
TemperatureFloat = Annotated[float, Field(ge=0.01, le=100)]
"""Samplers raise what is below 0.01 to 0.01, and divide by it."""
Gigabytes = Annotated[float, Field(gt=0, le=1e6)]


def _name(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank_name", "Input should be a name or path that is not blank")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise PydanticCustomError("no_text", "Input should be text that UTF-8 can say, without NUL")
    if max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        raise PydanticCustomError("long_name", f"Input should have at most {MAX_NAME_BYTES} bytes between slashes")
    return text


Name = Annotated[str, AfterValidator(_name)]
"""A path, hub id or other name: not blank, and such as a file system can hold."""
