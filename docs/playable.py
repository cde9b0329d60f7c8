"""Writes the dreams that are played on the site: `python docs/playable.py [NAME ...]`, in `docs/_static/dream/models/`.

Each pretrained run is exported to ONNX, packed, with its moments to begin at; the page there plays them.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
from pathlib import Path

import wmjax
from wmjax import weights

OUT = Path(__file__).resolve().parent / "_static" / "dream" / "models"
MOST = 8_000_000  # bytes of a model


def write(name: str) -> None:
    """The files of one pretrained run, such as "iris/catch"."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name.replace('/', '-')}.onnx"
        wmjax.export_step(f"pretrained:{name}", onnx=path)
        if path.stat().st_size > MOST:
            print(f"{name}: left out, it has {path.stat().st_size:,} bytes")
            return
        packed = OUT / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        (OUT / f"{path.stem}.json").write_bytes(path.with_suffix(".json").read_bytes())
        print(f"{name}: {path.stat().st_size:,} bytes, packed {packed.stat().st_size:,}")


if __name__ == "__main__":
    for name in sys.argv[1:] or weights.pretrained():
        write(name)
