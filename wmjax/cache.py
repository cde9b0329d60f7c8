"""The cache of compiled programs, kept between processes."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

CACHE_VARIABLE = "WMJAX_CACHE"


def _warn(text: str) -> None:
    print(f"wmjax: {text}", file=sys.stderr)


def enable_compilation_cache(warn: Callable[[str], None] = _warn) -> Path | None:
    """Keeps compiled programs between processes; a program's second start then takes seconds.

    `wmjax.train` and `wmjax.load` do this by themselves, as the commands do. The folder is that of JAX's own setting if
    there is one, else of the variable `WMJAX_CACHE`, else `wmjax/xla` in the user's cache folder. `WMJAX_CACHE=off`
    turns it off, and so does JAX's `jax_enable_compilation_cache`. For a GPU the folder also keeps which kernels were
    the fastest, so that a program that changes in part is tuned in part (`jax_persistent_cache_enable_xla_caches`).

    Args:
      warn: is told, in one line, why there is no cache where there should be one: it has no place that can be written.

    Returns:
      The folder, or None.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    wanted = os.environ.get(CACHE_VARIABLE, "")
    if wanted.lower() in ("off", "0", "none"):
        return None
    try:
        folder = Path(wanted or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = folder if wanted else folder / "wmjax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # else JAX would warn at every program
            pass
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home folder
        why = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        place = f"the folder {str(folder)!r}" if isinstance(error, OSError) else "its folder"
        warn(
            f"no compilation cache: {place} cannot be used ({why}); programs are compiled anew in every process. "
            f"{CACHE_VARIABLE} names another folder, or off"
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
