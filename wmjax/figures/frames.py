"""Frames of animations: pictures enlarged, with words and marks around them, written as GIF and as MP4."""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wmjax import files

PANEL = 256  # pixels that a picture is at least wide
INK, FAINT, PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)
SEEN, PREDICTED = (34, 120, 60), (214, 92, 10)  # what the model was shown, and what it was not
COLORS = 256  # of a GIF
LAST = 1500  # milliseconds that the last frame stays
RATE = 25  # frames of an MP4 in a second


def rgb(pixels: np.ndarray) -> np.ndarray:
    """Pictures `[..., H, W, C]` as `[..., H, W, 3]`: of a stack of gray or colored ones the last."""
    channels = pixels.shape[-1]
    if channels in (3, 4):  # four are color and opacity
        return pixels[..., :3]
    return pixels[..., -3:] if channels % 3 == 0 else np.repeat(pixels[..., -1:], 3, -1)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Pictures `[..., H, W, C]`, so large that they are at least `PANEL` wide."""
    return repeated(pixels, -(-PANEL // pixels.shape[-2]))


def repeated(pixels: np.ndarray, times: int) -> np.ndarray:
    """Pictures `[..., H, W, C]`, each pixel of which becomes a square of so many at a side."""
    return pixels.repeat(times, -3).repeat(times, -2)


@functools.cache
def font(size: int, *, bold: bool = False) -> Any:
    """DejaVu Sans, which comes with matplotlib."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def fitted(words: str, width: int, size: int, *, bold: bool = False) -> str:
    """Words cut so that they are at most so many pixels wide."""
    if font(size, bold=bold).getlength(words) <= width:
        return words
    while words and font(size, bold=bold).getlength(f"{words}...") > width:
        words = words[:-1]
    return f"{words}..."


def canvas(width: int, height: int) -> tuple[Any, Any]:
    """An empty picture of Pillow, and what draws on it."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), PAPER)
    return picture, ImageDraw.Draw(picture)


def paste(picture: Any, pixels: np.ndarray, left: int, top: int) -> None:
    """Puts uint8 `[H, W, 3]` on a picture."""
    from PIL import Image

    picture.paste(Image.fromarray(np.ascontiguousarray(pixels)), (left, top))


def write_png(path: Path, picture: Any) -> None:
    """Writes a picture of Pillow."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    files.write(path, buffer.getbuffer())


def write_gif(path: Path, pictures: Sequence[Any], milliseconds: int, last: int = LAST) -> None:
    """Writes an animation that begins again after its last frame, which stays for `last` milliseconds.

    All frames share their colors, so that only what changes is written.
    """
    colors = _palette(pictures)
    frames = [picture.quantize(palette=colors, dither=0) for picture in pictures]
    buffer, times = io.BytesIO(), [milliseconds] * (len(frames) - 1) + [last]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0, disposal=1)
    files.write(path, buffer.getbuffer())


def _palette(pictures: Sequence[Any]) -> Any:
    """A picture of Pillow that has the colors for all: theirs, where these are few enough."""
    from PIL import Image

    some = [pictures[i] for i in np.unique(np.linspace(0, len(pictures) - 1, 8).astype(int))]
    tall = Image.fromarray(np.concatenate([np.asarray(picture) for picture in some]))
    seen = tall.getcolors(2**16)
    if seen is not None and len(seen) <= COLORS:
        few = Image.new("P", (1, 1))
        few.putpalette([value for _, color in seen for value in color])
        return few
    # Each color counts by the root of its area: small things, and the marks, keep theirs beside a large background.
    pixels, counts = np.unique(np.asarray(tall)[::2, ::2].reshape(-1, 3), axis=0, return_counts=True)
    pixels = pixels.repeat(np.ceil(np.sqrt(counts)).astype(int), 0)
    return Image.fromarray(pixels[None]).quantize(COLORS)


def write_mp4(path: Path, pictures: Sequence[Any], milliseconds: int, last: int = LAST) -> bool:
    """Writes the same as a video where the program ffmpeg is there and can; returns whether it did."""
    program = shutil.which("ffmpeg")
    if program is None:
        return False
    width, height = pictures[0].size
    say = f"-y -loglevel error -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {1000 / milliseconds:g} -i -".split()
    # Sides have to be even, and players want colors at half the resolution.
    make = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-r", str(RATE), "-pix_fmt", "yuv420p", "-f", "mp4"]
    frames = [*pictures, *pictures[-1:] * round(last / milliseconds - 1)]
    try:
        with files.replacing(path) as temporary:
            process = subprocess.Popen(
                [program, *say, *make, str(temporary.resolve())], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            for picture in frames:
                process.stdin.write(picture.tobytes())
            process.stdin.close()
            if process.wait():
                raise BrokenPipeError
    except BrokenPipeError:  # it ended before all was written, such as one without what makes MP4
        process.wait()
        return False
    return True


def write_animation(path: Path, pictures: Sequence[Any], milliseconds: int, last: int = LAST) -> list[Path]:
    """Writes a GIF, and beside it the same as MP4 where ffmpeg is there (`write_mp4`). Returns the files."""
    write_gif(path, pictures, milliseconds, last)
    video = path.with_suffix(".mp4")
    return [path, video] if write_mp4(video, pictures, milliseconds, last) else [path]
