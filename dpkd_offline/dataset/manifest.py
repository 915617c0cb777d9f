"""Manifest entries: the small JSON file beside a shard that commits it, with its hash, size, rows and sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from dpkd_offline.common.errors import MismatchError
from dpkd_offline.common.files import first_fault
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.provenance import Count
from dpkd_offline.dataset.schema import SCHEMA_VERSION


class ManifestEntry(BaseModel):
    """What is committed of a shard."""

    file: str  # its name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(strict=True, ge=0)]
    rows: Count
    schema_version: Count = SCHEMA_VERSION
    facts: ShardStats

    @classmethod
    def parse(cls, value: Mapping[str, Any], path: Location) -> ManifestEntry:
        """The entry in the file at `path`.

        Raises:
            MismatchError: it is of another version of the schema, or a key is missing or wrong, so that it vouches for
                nothing.
        """
        if (schema_version := value.get("schema_version")) != SCHEMA_VERSION:
            raise MismatchError(f"{path}: schema version {schema_version}, this program reads {SCHEMA_VERSION}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise MismatchError(f"{path}: {first_fault(error)}") from error

    def check(self, path: Location, expected: Mapping[str, object]) -> None:
        """Raise MismatchError, naming the entry's own `path`, where one of these keys has another value."""
        for key, value in expected.items():
            if (stated := getattr(self, key)) != value:
                raise MismatchError(f"{path}: {key} is {stated!r}, there is {value!r}")
