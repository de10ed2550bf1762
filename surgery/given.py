"""Files that a manifest names."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema


@dataclass(frozen=True, slots=True)
class TextFile(os.PathLike[str]):
    """A file of the manifest: `given` as it is written there, `path` where it is on this machine."""

    given: str
    path: Path = field(compare=False)

    def __fspath__(self) -> str:
        return str(self.path)


def _text_file(value: Any, info: ValidationInfo) -> TextFile:
    if isinstance(value, TextFile):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be the name of a file")
    return TextFile(value, (info.context or {}).get("folder", Path()).absolute() / value)


# Relative names start at the manifest's folder; what is written down of a conversion has the name as it was given.
GivenFile: TypeAlias = Annotated[
    TextFile,
    PlainValidator(_text_file),
    PlainSerializer(lambda file: file.given, return_type=str),
    WithJsonSchema({"type": "string", "minLength": 1}),
]
