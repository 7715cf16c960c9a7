"""Values in JSON files: what is read is what was written, and what cannot be a value is refused in one line."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from prunet.disk.values import Value
from prunet.errors import UserError


@dataclass(frozen=True)
class Part:
    size: float
    memory: float | None


class Result(Value):
    name: str
    lpips: float | None = None
    parts: dict[str, Part]


def test_values_are_written_in_order_and_read_back(tmp_path: Path) -> None:
    """Optional fields without a value are left out, unmeasured ones are null, fields of other versions are kept."""
    result = Result(name="a", parts={"x": Part(1.5, None)})
    assert list(result.facts().items()) == [("name", "a"), ("parts", {"x": {"size": 1.5, "memory": None}})]
    result.save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == result
    (tmp_path / "b.json").write_text(json.dumps({"newer": [1], **result.facts(), "lpips": 0.1}))
    newer = Result.load(tmp_path / "b.json")
    assert newer.lpips == 0.1 and newer.facts() == {**result.facts(), "lpips": 0.1, "newer": [1]}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[]", "value"),
        ("{}", "name"),
        ('{"name": 3, "parts": {}}', "name"),
        ('{"name": "a", "parts": {"x": {"size": 1}}}', r"parts\.x\.memory"),
    ],
)
def test_a_wrong_value_is_one_line(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        UserError, match=rf"a\.json: damaged, or of another version \('{where}': .*\): do this$"
    ) as error:
        Result.load(tmp_path / "a.json", "do this")
    assert "\n" not in str(error.value)
