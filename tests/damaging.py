"""What happens to files."""

from __future__ import annotations

from pathlib import Path


def damage(file: Path, how: str) -> None:
    """`"delete"`, `"truncate"` by a byte, leave it `"empty"`, `"flip"` its last bit, or make it `"no text"`."""
    data = file.read_bytes()
    changed = {
        "truncate": data[:-1], "empty": b"", "flip": data[:-1] + bytes([data[-1] ^ 1]),
        "no text": bytes([data[0] ^ 128]) + data[1:],
    }  # fmt: skip
    file.unlink()  # other names of it stay as they are
    if how != "delete":
        file.write_bytes(changed[how])
