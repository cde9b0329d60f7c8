"""A comparison as one page of HTML that needs nothing else: tables for numbers, drawings beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from wmjax.comparison import pictures

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #57606a; --line: #d0d7de; --tint: #f6f8fa;
  --link: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9198a1; --line: #30363d;
  --tint: #161b22; --link: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .25rem; } h2 { font-size: 1.45rem; margin: 3rem 0 .75rem;
  padding-bottom: .3rem; border-bottom: 1px solid var(--line); } h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; } .soft, caption, figcaption, small { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
caption { text-align: left; padding: .35rem 0; font-size: .9rem; }
th, td { padding: .38rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td.text, th.text { text-align: left; } td.text { white-space: normal; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; } tbody tr:hover { background: var(--tint); } td small { display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem; }
figure { margin: .5rem 0 1rem; } figure svg { width: 100%; height: auto; } figcaption { font-size: .9rem; }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; } pre { background: var(--tint);
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; white-space: pre-wrap;
  word-break: break-word; }
.failed { color: light-dark(#b3261e, #ff8a80); } @media print { body { max-width: none; } }
"""
NONE = "–"


def html(report: Mapping[str, Any]) -> str:
    """The whole page."""
    title, parts = escape(report["title"]), []
    names = ", ".join(env["env"] for env in report["environments"])
    parts.append(f"<header><h1>{title}</h1><p class=soft>{escape(names)} · wmjax {escape(report['version'])} · "
                 f"{escape(report['date'][:10])}</p></header>")  # fmt: skip
    if report["failures"]:
        count = len(report["failures"])
        parts.append(f"<p class=failed>{count} run{'s' * (count > 1)} failed, see <a href=#left-out>below</a>.</p>")
    for number, env in enumerate(report["environments"]):
        parts.append(_environment(env, number, report["ablations"]))
    if report["over_environments"]:
        parts.append(_over_environments(report["over_environments"]))
    parts += [_left_out(report), _how(report)]
    body = "\n".join(part for part in parts if part)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{title}</title><style>{STYLE}</style></head>\n'
            f"<body>\n<main>\n{body}\n</main>\n</body></html>\n")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and tables


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits, and a minus that is one."""
    if value is None:
        return NONE
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", "−") if "e" not in text else text


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def score(found: Mapping[str, Any]) -> str:
    """IQM and its interval."""
    if found["iqm"] is None:
        return NONE
    low_high = "" if found["interval"] is None else " <small>[{}, {}]</small>".format(*map(number, found["interval"]))
    return f"{number(found['iqm'])}{low_high}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1000 * seconds)} ms"


def size(count: float | None) -> str:
    if count is None:
        return NONE
    return f"{number(count / 1e9)} GB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """Cells are HTML; the first of each row names it. `text` are columns of words."""
    kind = lambda i: " class=text" if i in text else ""
    top = "".join(f"<th scope=col{kind(i)}>{cell}</th>" for i, cell in enumerate(head))
    line = lambda row: (
        f"<th scope=row>{row[0]}</th>" + "".join(f"<td{kind(i)}>{x}</td>" for i, x in enumerate(row[1:], 1))
    )
    body = "\n".join(f"<tr>{line(row)}</tr>" for row in rows)
    return (f"<div class=wide><table><caption>{caption}</caption><thead><tr>{top}</tr></thead>\n"
            f"<tbody>\n{body}\n</tbody></table></div>")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page


def _environment(env: Mapping[str, Any], number_of: int, ablations: Mapping[str, Any]) -> str:
    drawn = {name: _figure(env, number_of, *rest, name=name) for name, *rest in pictures.of_environment(env)}
    parts = [f"<section><h2>{escape(env['env'])}</h2>", _returns(env)]
    if ablations:
        parts.append(_ablations(env, ablations))
    parts.append(f"<h3>Learning</h3><div class=pair>{drawn.pop('steps')}{drawn.pop('seconds')}</div>")
    parts.append(f"<h3>How sure that is</h3><div class=pair>{drawn.pop('scores')}{drawn.pop('profiles')}</div>")
    parts.append(_improvement(env))
    found = env["open_loop"]
    if drawn or found.get("notes"):
        words = (
            f"Models see {found['context']} steps and predict the rest from the actions alone, on the same "
            f"{found['episodes']} held-out windows for all: {escape(found['policy'])}. Mean squared error, pictures in "
            "[0, 1], with the interval over seeds. A model below the dashed line knows more than that the last frame "
            "stays."
        ) if drawn else ""  # fmt: skip
        notes = "".join(f"<li>{escape(note)}</li>" for note in found.get("notes", ()))
        parts.append(f"<h3>Open-loop prediction</h3><p>{words}</p><div class=pair>{''.join(drawn.values())}</div>")
        parts.append(f"<ul>{notes}</ul>" if notes else "")
    return "\n".join([*parts, _costs(env), "</section>"])


def _figure(env: Mapping[str, Any], number_of: int, words: str, draw: Any, size: Any, legend: bool, name: str) -> str:
    drawing = pictures.svg(draw, size, legend, f"e{number_of}-{name}")
    label = escape(f"{words}, {env['env']}; the numbers are in report.json", quote=True)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>{drawing}<figcaption>{escape(words)}</figcaption></figure>"


def _returns(env: Mapping[str, Any]) -> str:
    reference, rows, few = env["reference"], [], []
    threshold = reference["threshold"]
    for group in env["groups"]:
        seeds = ", ".join(number(value) for value in group["end"]["by_seed"])
        reached = [f"{group['reached']} of {len(group['seeds'])}", count(group["threshold_steps"]),
                   duration(group["threshold_seconds"])]  # fmt: skip
        rows.append(
            [escape(group["label"]), seeds, score(group["end"]), number(group["end"]["mean"]),
             score(group["at_equal_steps"]), score(group["at_equal_seconds"])]
            + ([] if threshold is None else reached)
        )  # fmt: skip
        few += [f"{group['label']}: {group['too_few']}"] * bool(group["too_few"])
        few += [f"{group['label']}: not evaluated at the end: seeds {', '.join(map(str, group['unfinished']))}"] * bool(
            group["unfinished"]
        )
    if len({group["seeds_at_once"] for group in env["groups"]}) > 1:
        few.append("not all learned as many seeds in one program, so equal wall times are not of equal work")
    head = ["Agent", "Return of each seed, at its end", "IQM", "Mean",
            f"IQM at {count(env['equal_steps'])} steps", f"IQM at {duration(env['equal_seconds'])}"]  # fmt: skip
    if threshold is not None:
        head += [f"Seeds that reach {number(threshold)}", "Steps to it", "Time to it"]
    known = [f"random play {number(reference['random'])}"] * (reference["random"] is not None)
    known += [f"{reference['best_is']} {number(reference['best'])}"] * (reference["best"] is not None)
    caption = (
        "Mean return of evaluation episodes. Seeds are in ascending order; IQM is the interquartile mean over seeds, "
        "with its 95% bootstrap interval. The columns at equal steps and at equal wall time are read off the "
        f"evaluations, at the most that all runs reached; {NONE} where there was none by then. "
    ) + (f"For comparison: {escape(', '.join(known))}." if known else "")
    words = "".join(f"<li>{escape(line)}</li>" for line in few)
    return table(caption, head, rows, text=(1,)) + (f"<ul class=soft>{words}</ul>" if words else "")


def _ablations(env: Mapping[str, Any], ablations: Mapping[str, Any]) -> str:
    groups = {group["label"]: group for group in env["groups"]}
    matrix = env["improvement"]
    full = next((label for label in groups if label not in ablations), None)
    rows = []
    for name, group in groups.items():
        told = ablations.get(name, {"about": "The agent as it is.", "changes": {}})
        changes = ", ".join(f"{field} = {value}" for field, value in told["changes"].items())
        cell = None
        if name != full and full in matrix["labels"] and name in matrix["labels"]:
            cell = matrix["matrix"][matrix["labels"].index(full)][matrix["labels"].index(name)]
        rows.append([escape(name), f"{escape(told['about'])}<small><code>{escape(changes)}</code></small>",
                     ", ".join(map(number, group["end"]["by_seed"])), score(group["end"]),
                     _probability(cell)])  # fmt: skip
    head = ["Ablation", "What it changes", "Return of each seed", "IQM", "P(full agent is better)"]
    return "<h3>Ablations</h3>" + table("Returns at the end.", head, rows, text=(1,))


def _probability(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return NONE
    interval = "" if cell["interval"] is None else " <small>[{:.2f}, {:.2f}]</small>".format(*cell["interval"])
    return f"{cell['probability']:.2f}{interval}"


def _improvement(env: Mapping[str, Any]) -> str:
    labels = [escape(label) for label in env["improvement"]["labels"]]
    if len(labels) < 2:
        return ""
    rows = [[label, *map(_probability, row)] for label, row in zip(labels, env["improvement"]["matrix"], strict=True)]
    return table(
        "Probability of improvement: that a seed of the row earns more than one of the column, at its end; a tie "
        "counts half. With 95% bootstrap intervals.", ["", *labels], rows,
    )  # fmt: skip


def _costs(env: Mapping[str, Any]) -> str:
    rows = []
    for group in env["groups"]:
        cold = group["compile_seconds"]
        cold = None if cold is None else cold + (group["compile_seconds_saved"] or 0.0)
        devices = ", ".join(dict.fromkeys(group["devices"] or ()))
        memory = size(group["peak_device_bytes"] or group["peak_memory_bytes"])
        rows.append([
            escape(group["label"]), count(group["parameters"]), memory, duration(cold),
            duration(group["update_seconds"]), number(group["steps_per_second"]),
            count(max(group["steps"])), duration(max(group["seconds"])), str(group["seeds_at_once"]),
            escape(devices) or NONE,
        ])  # fmt: skip
    head = ["Agent", "Parameters", "Peak memory", "Compile time", "Update time", "Env steps/s", "Env steps",
            "Wall time", "Seeds at once", "On"]  # fmt: skip
    caption = (
        "What it takes. Memory is that of the accelerator where there is one, else of the process; where several seeds "
        "learn at once, in one program, all numbers but the parameters are of all of them together. Compile time is "
        "what it takes without a cache of compiled programs; update time contains the env steps that an update waits "
        f"for; speeds leave out compiling, evaluating and saving. {NONE} was not recorded."
    )
    return f"<h3>What it takes</h3>{table(caption, head, rows)}"


def _over_environments(found: Sequence[Mapping[str, Any]]) -> str:
    names = {"iqm": "IQM", "mean": "Mean", "median": "Median", "optimality_gap": "Optimality gap"}
    rows = []
    for group in found:
        cells = [score({"iqm": group[name]["value"], "interval": group[name]["interval"]}) for name in names]
        rows.append([escape(group["label"]), *cells, str(group["runs"])])
    caption = (
        "Returns at the end, scaled so that random play is 0 and the best known return is 1, over all environments."
    )
    return (
        f"<section><h2>Over all environments</h2>{table(caption, ['Agent', *names.values(), 'Seeds'], rows)}</section>"
    )


def _left_out(report: Mapping[str, Any]) -> str:
    rows = [[escape(f["label"]), escape(f["env"]), f"<span class=failed>{escape(f['reason'])}</span>",
             ", ".join(map(str, f["seeds"])), size(f["peak_memory_bytes"] or None), duration(f["seconds"])]
            for f in report["failures"]]  # fmt: skip
    rows += [[escape(s["label"]), escape(s["env"]), escape(s["reason"]), NONE, NONE, NONE] for s in report["skipped"]]
    if not rows:
        return ""
    head = ["Agent", "Environment", "Why", "Seeds", "Peak memory", "Time"]
    caption = (
        "Runs that failed are tried again by the same command; agents that cannot take an environment are left out."
    )
    return f"<section id=left-out><h2>Not compared</h2>{table(caption, head, rows, text=(1, 2))}</section>"


def _how(report: Mapping[str, Any]) -> str:
    machine, jobs = report["machine"], report["settings"].get("jobs", 1)
    notes = [f"{jobs} runs at once shared the machine: speeds and wall times are of that."] * (jobs > 1)
    notes += report["notes"]
    versions = sorted({
        ", ".join(f"{name} {version}" for name, version in (group["versions"] or {}).items())
        for env in report["environments"] for group in env["groups"]
    } - {""})  # fmt: skip
    commands = sorted(
        {group["command"] for env in report["environments"] for group in env["groups"] if group["command"]}
    )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"""<section><h2>How this was made</h2>
<pre><code>{escape(report["command"])}</code></pre>
<p>On {escape(machine["system"])}, {machine["processors"]} processors; runs by
{escape("; ".join(versions) or "unknown")}.</p>
<p>Statistics are those of <cite>Agarwal et al. 2021, Deep RL at the Edge of the Statistical Precipice</cite>:
percentile intervals of {report["resamples"]:,} bootstrap resamples of the seeds within each environment, from
{report["least_runs"]} seeds on. With so few seeds an interval is a hint, not a proof.</p>
{f"<ul>{items}</ul>" if items else ""}
<details><summary>The commands of the runs</summary><pre><code>{escape(chr(10).join(commands))}</code></pre></details>
</section>"""
