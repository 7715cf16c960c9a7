"""Values with fields, each in its own JSON file: results that later steps read."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from prunet.disk.files import AGAIN, read_json, write_json
from prunet.errors import UserError


class Stored(BaseModel):
    """The content of a JSON file."""

    @classmethod
    def load(cls, path: Path, fix: str = AGAIN) -> Self:
        """Reads a value that `save` wrote.

        Raises:
            UserError: the file is missing, damaged, changed, or lacks a field of this version; the message ends with
                `fix`.
        """
        try:
            return cls.model_validate(read_json(path, fix))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "value"
            raise UserError(f"{path}: damaged, or of another version ({where!r}: {first['msg']}): {fix}") from error

    def save(self, path: Path) -> None:
        """Writes the value as JSON, with a checksum."""
        write_json(path, self.facts())

    def facts(self) -> dict[str, Any]:
        """Returns the value as plain JSON types."""
        return self.model_dump()


class Value(Stored):
    """A value with named fields. A field with the default None is written only if it is not None.

    Fields of other versions of prunet are kept.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = {name for name, field in type(self).model_fields.items() if field.default is None}
        return {name: value for name, value in write(self).items() if value is not None or name not in optional}
