"""Where records to train on lie: a folder of episodes, a run's replay, or a data set of Minari. All are only read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from wmjax import checks, files
from wmjax.episodes.format import FORMAT, INDEX, INDEX_BYTES, read_npz, spec_of
from wmjax.run_folder import CONFIG
from wmjax.types import EnvSpec, UsageError

SETTINGS = ("env", "image_size", "action_repeat", "env_args")
VALID = "a folder that wmjax record wrote, a folder of .npz episodes, a run folder with its replay, and minari:NAME are"


class Source(NamedTuple):
    """Stretches of consecutive records, read one at a time."""

    path: str  # as `config.json` keeps it
    names: tuple[str, ...]  # of the stretches, in order
    # (name) -> its arrays `[T, ...]` by name, and a digest of them; raises `ValueError` saying what is wrong with it
    read: Callable[[str], tuple[dict[str, np.ndarray], bytes]]
    settings: Mapping[str, Any] = MappingProxyType({})  # of the environment, as in `config.json`, as far as known
    spec: EnvSpec | None = None  # of the environment, where it is written beside them
    strict: bool = False  # whether all that wmjax writes must be there
    chosen: bool = True  # whether actions lie beside what they were chosen on; else each stretch shows


def open_source(path: Any) -> Source:
    """What lies at a path. Raises `UsageError` where that is nothing to train on."""
    if isinstance(path, str) and path.startswith("minari:"):
        from wmjax.episodes.minari_data import open_minari

        return open_minari(path)
    place = checks.path("data", path).absolute()
    if not place.is_dir():
        raise UsageError(f"data: {str(path)!r} is not a folder; {VALID}")
    if (place / INDEX).exists():
        return _recorded(place)
    if (place / CONFIG).exists():
        from wmjax.episodes.runs import open_run

        return open_run(place)
    names = tuple(sorted(found.name for found in place.iterdir() if found.suffix == ".npz"))
    if not names:
        raise UsageError(f"data: {str(path)!r} holds no episodes; {VALID}")
    return Source(str(place), names, lambda name: read_npz(place / name), chosen=False)


def _recorded(place: Path) -> Source:
    """A folder that `wmjax record` wrote."""
    refuse = lambda reason: UsageError(f"data: {INDEX} in {str(place)!r} cannot be read: {reason}")
    try:
        said = files.parse_json(files.read(place / INDEX, INDEX_BYTES))
    except (OSError, ValueError) as error:
        raise refuse(getattr(error, "strerror", None) or error) from None
    if not isinstance(said, dict) or not isinstance(said.get("episodes"), dict) or checks.is_deep(said):
        raise refuse("it names no episodes")
    if not isinstance(said.get("format"), int) or said["format"] > FORMAT:
        raise refuse(f"its format is {checks.show(said.get('format'))}, and this version reads {FORMAT}")
    odd = next((name for name in said["episodes"] if Path(name).name != name or not name.endswith(".npz")), None)
    if odd is not None:
        raise refuse(f"{odd[:80]!r} is not the name of an episode in it")
    try:
        spec = spec_of(said.get("spec"))
        settings = _settings(said)
    except UsageError as error:
        raise refuse(error) from None

    def read(name: str) -> tuple[dict[str, np.ndarray], bytes]:
        if not (place / name).exists():
            raise ValueError("it is missing")
        arrays, digest = read_npz(place / name)
        length = said["episodes"][name]
        if "reward" in arrays and arrays["reward"].shape != (length,):
            raise ValueError(f"it has {len(np.atleast_1d(arrays['reward']))} records, where {INDEX} says {length!r}")
        return arrays, digest

    return Source(str(place), tuple(sorted(said["episodes"])), read, settings, spec, strict=True)


def _settings(said: Mapping[str, Any]) -> dict[str, Any]:
    """How the environment was made. Raises `UsageError` at a value that is not valid."""
    found = {name: said.get(name) for name in SETTINGS}
    if found["env"] is not None:
        checks.text("env", found["env"])
    for name in ("image_size", "action_repeat"):
        checks.optional(name, found[name])
    if not isinstance(found["env_args"] or {}, dict):
        raise checks.invalid("env_args", found["env_args"], "an object")
    found["action_repeat"] = found["action_repeat"] or 1  # not a preset's
    return {name: value for name, value in found.items() if value is not None}
