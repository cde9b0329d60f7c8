"""The cache of compiled programs, kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

import jax

CACHE_VARIABLE = "WMJAX_CACHE"


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs between processes; a program's second start then takes seconds.

    The folder is that of JAX's own setting if there is one, else of the variable `WMJAX_CACHE`, else `wmjax/xla` in the
    user's cache folder. `WMJAX_CACHE=off` turns it off. Returns the folder, or None.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    wanted = os.environ.get(CACHE_VARIABLE, "")
    if wanted.lower() in ("off", "0", "none"):
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(wanted).expanduser() if wanted else home / "wmjax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
