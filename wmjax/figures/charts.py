"""Charts as files: where one may be written, how it is, and how a notebook shows it."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

from wmjax import checks, files
from wmjax.types import UsageError


def picture_path(path: str | Path) -> Path:
    """Where a chart is written: `path`, with `.png` where it has no suffix.

    Raises `UsageError` where no chart can be written there: the suffix is of no format, or needs TeX, which is not
    there; a folder or a device has the name; the folder above is not there or cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    path, formats = checks.path("out", path), Figure().canvas.get_supported_filetypes()
    if path.is_dir():
        raise UsageError(f"out: {str(path)!r} is a folder; a file in it is valid, such as {str(path / 'curve.png')!r}")
    if not path.suffix.rstrip("."):
        if not path.name.strip(".") or path.name.removeprefix(".").lower() in formats:
            raise UsageError(f"out: {str(path)!r} has no name before its suffix")
        path = path if path.exists() and not path.is_file() else path.with_name(f"{path.name.rstrip('.')}.png")
    if path.exists() and not path.is_file():
        raise UsageError(f"out: {str(path)!r} is not a regular file, and no other is replaced")
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"out: {str(path)!r} has a suffix of no format; valid are {', '.join(sorted(formats))}")
    if path.suffix.lower() == ".pgf" and not shutil.which(tex := matplotlib.rcParams["pgf.texsystem"]):
        raise UsageError(
            f"out: {str(path)!r} needs TeX ({tex}), which is not installed; .pdf or .svg are valid without"
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        why = "cannot be written to" if path.parent.is_dir() else "does not exist"
        raise UsageError(f"out: {str(path)!r} cannot be written: the folder {str(path.parent)!r} {why}")
    return path


def save(figure: Any, path: Path) -> Path:
    """Writes a figure of matplotlib to where `picture_path` said. Raises `UsageError` where that cannot be done."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=150, format=path.suffix[1:].lower())
        files.write(path, picture.getbuffer())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of TeX
        raise UsageError(f"out: {str(path)!r} cannot be written: {str(error).splitlines()[0]}") from None
    return path


def show(path: str | Path) -> Any:
    """A picture in a file, such as a PNG or a GIF, as the last line of a cell of a notebook shows it.

    Raises `UsageError` where there is no such file, or without IPython.
    """
    path = checks.path("picture", path)
    try:
        from IPython.display import Image
    except ImportError:
        raise UsageError(
            'show: needs IPython, which the extra `notebooks` brings: pip install "wmjax[notebooks]"'
        ) from None
    if not path.is_file():
        raise UsageError(f"picture: {str(path)!r} is not a file")
    return Image(filename=str(path))


def plain(words: str) -> str:
    """Words in which nothing is taken for mathematics."""
    return words.replace("$", r"\$")


def legend_below(figure: Any, note: str = "") -> None:
    """What lines mean, below all panels, where no data is; each label once. `note` stands under it."""
    labelled = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    columns = 1 if max(map(len, labelled), default=0) > 40 else 2
    legend = figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=min(columns, max(1, len(labelled))),
        fontsize="small", frameon=False, title=note or None, title_fontsize="x-small",
    )  # fmt: skip
    legend.get_title().set_multialignment("center")
