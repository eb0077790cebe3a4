"""What `--in` names, before anything is made of it."""

import pytest

from kbne_edit.errors import SourceError
from kbne_edit.source import resolved


@pytest.mark.parametrize("index, message", [
    ("[]", "has no weight_map"),
    ('{"weight_map": ["a.bin"]}', "has no weight_map"),
    ('{"weight_map": {"a": ["a.bin"]}}', "has no weight_map"),
    ('{"weight_map": {"a": "a.bin", "b": 3}}', "has no weight_map"),
    ('{"weight_map": {}, "weight_map": {}}', "a key stands twice"),
    ("[" * 100_000, "is not JSON that can be read"),
    (b"\xff{}", "is not JSON that can be read"),
    (" " * (25 << 20), "more than 24 MB"),
    ('{"weight_map": {"a": "../a.bin"}}', "names '../a.bin', which is missing"),
], ids=range(9))  # fmt: skip
def test_an_index_of_bin_weights_is_read_strictly(index, message, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not reached")
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(index if isinstance(index, bytes) else index.encode())
    with pytest.raises(SourceError, match=message) as error, resolved(str(tmp_path)):
        pass
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
