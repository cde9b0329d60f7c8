"""`wmjax list`."""

from __future__ import annotations

import fnmatch
import sys
import textwrap
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from wmjax.cli.arguments import ListArgs, parse
from wmjax.names import did_you_mean, meant
from wmjax.types import UsageError

WIDTH = 80
EXAMPLES = 4  # of a group of environments, where no pattern is given


class Group(NamedTuple):
    """Environments that come together."""

    title: str
    prefix: str  # of their names, before the colon; "" for those that have none
    needs: tuple[tuple[str, str], ...] = ()  # the extra that brings them -> the module that it brings
    all_need: bool = True  # whether none of them is there without it


GROUPS = (
    Group("on the device", ""),
    Group("probes, on the device: small tasks with known answers", "probe"),
    Group("gymnax, on the device", "gymnax", (("gymnax", "gymnax"),)),
    Group("Craftax, on the device", "craftax", (("craftax", "craftax"),)),
    Group("Gymnasium, in worker processes", "gym", (("box2d", "Box2D"), ("mujoco", "mujoco")), False),
    Group("Atari 100k, in worker processes", "atari", (("atari", "ale_py"),)),
    Group("Atari 200M, in worker processes", "atari200m", (("atari", "ale_py"),)),
    Group("Crafter, in worker processes", "crafter", (("crafter", "crafter"),)),
    Group("DeepMind Control Suite from pixels, in worker processes", "dmc", (("dmc", "dm_control"),)),
    Group("DeepMind Control Suite from vectors, in worker processes", "dmc_proprio", (("dmc", "dm_control"),)),
    Group("Doom, in worker processes", "vizdoom", (("vizdoom", "vizdoom"),)),
)


def list_names(argv: Sequence[str]) -> None:
    args = parse(ListArgs, argv, "wmjax list")
    if args.what == "envs":
        _list_envs(args.pattern)
    elif args.what == "agents":
        from wmjax.agents import AGENTS

        what = {name: sys.modules[f"wmjax.agents.{name}"].__doc__.splitlines()[0] for name in AGENTS}
        for name in _matching(args.pattern, what):
            _print_row(name, what[name])
    elif args.what == "pretrained":
        _list_pretrained(args.pattern)
    else:
        from wmjax.presets import PRESET_NOTES, PRESETS

        rows = [(f"{agent} {preset}", preset) for agent, table in PRESETS.items() for preset in table]
        shown = set(_matching(args.pattern, [name for name, _ in rows]))
        for name, preset in rows:
            if name in shown:
                _print_row(name, PRESET_NOTES[preset], width=32)


def _print_row(name: str, text: str, width: int = 16) -> None:
    print(textwrap.fill(f"{name.ljust(width)} {text}", WIDTH, subsequent_indent=" " * (width + 1)))


def _matching(pattern: str | None, names: Iterable[str]) -> list[str]:
    """Names that have the pattern in them or, if it is a glob, are of its form, in any case; an error if none is."""
    names = list(names)
    if pattern is None:
        return names
    if found := [name for name in names if _matches(pattern, name)]:
        return found
    near = did_you_mean([repr(x) for x in meant(pattern, names)])
    raise UsageError(
        f"pattern: nothing matches {pattern!r}; {near or 'a part of a name, or a glob such as *Pole*, is valid'}"
    )


def _matches(pattern: str, name: str) -> bool:
    pattern, name = pattern.lower(), name.lower()
    if not set(pattern) & set("*?["):
        return pattern in name
    return any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.partition(":")[2]))


def _list_pretrained(pattern: str | None) -> None:
    """The cards."""
    from wmjax import weights
    from wmjax.loops.memory import amount

    for name in _matching(pattern, [weights.PREFIX + name for name in weights.pretrained()]):
        file = weights.read(weights.locate(name))
        card, about = file.card, file.description
        print(name)
        for line in (
            f"{about['agent']} on {about['env']}, {_told_return(card)}",
            f"{_told_training(card)}; {card['parameters']:,} parameters, {amount(file.path.stat().st_size)}",
            card["command"],
            f"digest {card['digest']}",
        ):
            print(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False))


def _told_return(card: dict[str, Any]) -> str:
    found = card["return"]
    if found is None:
        return "return not measured"
    told = f"return {found['mean']:.4g} over {found['episodes']} episodes, action {found['action']}"
    if found["interval"] is None:
        return told
    low, high = found["interval"]
    return f"{told} (of as many others within [{low:.4g}, {high:.4g}] 99 times in 100)"


def _told_training(card: dict[str, Any]) -> str:
    spent = f"in {card['seconds'] / 60:.0f} minutes on {card['device']}" if card["seconds"] else ""
    return f"trained for {card['steps']:,} env steps {spent}, seed {card['seed']}".replace(" ,", ",")


def _list_envs(pattern: str | None) -> None:
    """By suite: all that match, or without a pattern some of each."""
    from wmjax.envs import env_names

    infos = {info.name: info for info in env_names()}
    names = {group.prefix: [name for name in infos if _prefix(name) == group.prefix] for group in GROUPS}
    lost = [group for group in GROUPS if pattern and not names[group.prefix] and _matches(pattern, group.prefix)]
    shown = set(infos) if pattern is None else set() if lost else set(_matching(pattern, infos))
    shown |= {name for name in infos if pattern is not None and _matches(pattern, name)}
    for group in GROUPS:
        own = [name for name in names[group.prefix] if name in shown]
        if not own and pattern is not None and group not in lost:
            continue
        print(textwrap.fill(_header(group, len(own)), WIDTH, subsequent_indent="  "))
        if pattern is None and group.prefix:
            more = ", …" if len(own) > EXAMPLES else ""
            if own:
                text = ", ".join(own[:EXAMPLES]) + more
                print(textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
            continue
        for name in own:
            info = infos[name]
            about = "; ".join(text for text in (info.obs, info.action, info.description if info.obs else "") if text)
            line = f"{name}  {about}" if about else name
            print(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False))
    if pattern is None:
        print("`wmjax list envs PATTERN` shows all that match, such as *pole* or gym:")


def _prefix(name: str) -> str:
    head, colon, _ = name.partition(":")
    return head if colon or head in {group.prefix for group in GROUPS} else ""


def _header(group: Group, count: int) -> str:
    missing = [extra for extra, module in group.needs if find_spec(module) is None]
    state = f"{count} names" if count != 1 else "1 name"
    if missing:
        install = ", ".join(f'pip install "wmjax[{extra}]"' for extra in missing)
        state = f"missing: {install}" if group.all_need else f"{state}; some are missing: {install}"
    elif group.needs:
        state = f"{state}, installed"
    named = f" ({group.prefix}:NAME)" if group.prefix else ""
    return f"{group.title}{named}: {state}"
