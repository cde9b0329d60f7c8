"""What may be meant by the name of an environment that there is not: names of other projects, and near ones."""

from __future__ import annotations

import re
from collections.abc import Iterable

from wmjax.envs.atari_scores import SCORES
from wmjax.suites import SUITES, gym_suite, near

DOMAINS = (
    "acrobot|ball_in_cup|cartpole|cheetah|cup|dog|finger|fish|hopper|humanoid_CMU|humanoid|manipulator|pendulum|"
    "point_mass|quadruped|reacher|stacker|swimmer|walker"
)
# What other projects call these, and what is here; on the whole name, in any case.
PATTERNS = (
    (rf"(?:dmc(?:_vision)?|dm_control|dm)[_:/-]({DOMAINS})[_-](\w+?)(?:-v\d+)?", r"dmc:\1_\2"),
    (rf"(?:dmc_proprio)[_:/-]({DOMAINS})[_-](\w+)", r"dmc_proprio:\1_\2"),
    (rf"({DOMAINS})[_-]([a-z]\w+)", r"dmc:\1_\2"),
    (r"(?:gym:)?crafter(?:[_:/-]?(?:reward|v\d+))*", "crafter"),
    (r"crafter[_:/-]?no_?reward(?:-v\d+)?", "crafter:noreward"),
    (r"(?:gymnasium|gym|openai|farama)[:/]+(.+)", r"gym:\1"),
    (r"(.+-v\d+)", r"gym:\1"),
    (r"([\w.]+|.*\.py):([\w.-]+)", r"gym:\1:\2"),
)


def meant(name: str, valid: Iterable[str]) -> str | None:
    """The nearest of what there is to an unknown name; `valid` are the names of environments on the device."""
    full, tasks = {_plain(x): x for x in valid}, {_plain(x.split(":")[-1]): x for x in valid}
    plain = _plain(name)
    if plain in full:
        return full[plain]
    minatar = re.search(r"minatar[:/](\w+?)(?:-v\d+)?$|(\w+)-minatar", name, re.IGNORECASE)
    if minatar:
        return f"gymnax:{_camel(minatar.group(1) or minatar.group(2))}-MinAtar"
    if atari := atari_game(name):
        return atari
    if doom := re.fullmatch(r"(?:\w+[:/])?vizdoom[:/]?(\w+?)(?:-v\d+)?", name, re.IGNORECASE):
        return f"vizdoom:{doom.group(1)}"
    registered = _registered(name)
    if re.search(r"-v\d+$", name) and registered:
        return registered
    # A task's name alone is near to its full name, whatever its suite.
    if found := tasks.get(plain) or registered or _translated(name, full):
        return found
    names = {x: x for x in full.values()} | {x.split(":")[-1]: x for x in full.values()}
    return names.get(near(name, names, 0.5))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _translated(name: str, full: dict[str, str]) -> str | None:
    """What another project's name is here."""
    if near(name, full.values(), 0.8) or name.partition(":")[0] in (*SUITES, "gymnax", "craftax", "probe"):
        return None
    found = ((re.fullmatch(pattern, name, re.IGNORECASE), there) for pattern, there in PATTERNS)
    return next((match.expand(there) for match, there in found if match), None)


def atari_game(name: str) -> str | None:
    """The game that Gymnasium, ale-py or another project calls so, such as "ALE/Pong-v5"."""
    task = re.sub(r"^(?:gym(?:nasium)?|atari(?:100k|200m)?|ale|ale_py)[:/_-]+", "", name, flags=re.IGNORECASE)
    task = re.sub(r"^(?:ale|atari|ale_py)[:/_-]+", "", task, flags=re.IGNORECASE)
    task = re.sub(r"(?:-?ram)?(?:-?NoFrameskip|-?Deterministic)?(?:-v\d+)?$", "", task, flags=re.IGNORECASE)
    games = {game.lower(): game for game in SCORES}
    game = games.get(re.sub(r"[^a-z0-9]", "", task.lower()))
    suite = "atari200m" if name.lower().startswith("atari200m") else "atari"
    return f"{suite}:{game}" if game else None


def _registered(name: str) -> str | None:
    """The id in Gymnasium's registry that is meant, where that library is installed: with or without a version."""
    task = re.sub(r"^(?:gymnasium|gym|openai|farama)[:/]+", "", name, flags=re.IGNORECASE)
    if ":" in task:
        return None
    ids = {spec.lower(): spec for spec in gym_suite.gymnasium().registry}
    newest = {re.sub(r"-v\d+$", "", name.lower()): name for name in gym_suite.names()}
    found = ids.get(task.lower()) or newest.get(re.sub(r"-v\d+$", "", task.lower()))
    return f"gym:{found}" if found else None


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
