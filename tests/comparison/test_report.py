"""The report of runs that are there already, and what the command says of bad input."""

import html.parser
import json

import pytest

from tests.comparison.fake_runs import write_run
from wmjax import comparison
from wmjax.cli import main
from wmjax.comparison import report

CURVE = [(100, -0.5), (500, 0.0), (1000, 0.9)]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Checks that elements close in order, that ids come once, and that nothing outside is asked for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.used, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids)) and set(self.used) <= set(self.ids)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        for name in ("src", "href", "xlink:href"):
            if name in attrs:
                assert attrs[name].startswith("#"), attrs[name]
                self.used.append(attrs[name][1:])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def no_open_loop(monkeypatch):
    """There is no model in these folders."""
    errors = {"mean": [0.05, None], "by_seed": [[0.05, None]], "interval": None}
    image = {"repeat_last": [0.1, None], "mean_frame": [0.2, None]}
    found = {"context": 5, "horizon": 2, "count": [4, 0], "episodes": 64, "policy": "half at random"}

    def fake(groups, how, say):
        entries = {"image": image | {"agents": {group.label: errors for group in groups}}}
        return found | {"notes": ["a <note>"], "entries": entries}

    monkeypatch.setattr(report, "_open_loop", fake)


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "iris", "iris", CURVE, [1.0, 0.9, 0.8]),
        write_run(tmp_path / "v3", "dreamer_v3", CURVE, [0.5, 0.6, 0.9], seconds=300.0),
        write_run(tmp_path / "v2", "dreamer_v2", CURVE, 0.7),
    ]


def test_runs_that_are_there_give_page_picture_and_numbers(tmp_path, runs, no_open_loop, capsys):
    out = tmp_path / "out"
    assert main(["compare", "--runs", *map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "catch, iris: IQM 0.900 [0.800, 1.000] of 3 seeds" in said
    assert "1 seed: too few for an interval" in said
    numbers = json.loads((out / "report.json").read_text())
    assert [group["label"] for group in numbers["environments"][0]["groups"]] == ["iris", "dreamer_v3", "dreamer_v2"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.html").read_text()
    page = Page(text)
    assert "http" not in text.replace("http://www.w3.org/", "")  # namespaces of SVG
    assert "1 seed: too few for an interval" in page.text and "a <note>" in page.text
    assert "not all learned as many seeds in one program" in page.text  # three, and one
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags) >= 3
    for seed in ("0.8", "0.9", "0.5", "0.7"):
        assert seed in page.text


def test_failures_and_what_is_left_out_are_rows(tmp_path, runs, no_open_loop):
    how = comparison._checked({})
    failure = dict(
        label="iris", env="catch", seeds=[0], reason="killed by SIGKILL <>", peak_memory_bytes=2e9, seconds=9
    )
    left = dict(label="world_models", env="catch", reason="it sees no picture")
    found, written = report.write_report(tmp_path / "o", runs[:1], how, title="T", failures=[failure], skipped=[left])
    text = Page((tmp_path / "o" / "report.html").read_text()).text
    assert "killed by SIGKILL <>" in text and "it sees no picture" in text and "2 GB" in text
    assert found["failures"] == [failure] and len(written) == 3
    found, written = report.write_report(tmp_path / "p", [], how, title="T", failures=[failure])
    assert found["environments"] == [] and [path.suffix for path in written] == [".html", ".json"]
    Page((tmp_path / "p" / "report.html").read_text())


def test_ablations_have_a_table_against_the_agent_as_it_is(tmp_path, no_open_loop):
    runs = {
        write_run(tmp_path / "a", "dreamer_v3", CURVE, [1.0, 1.0, 1.0]): "dreamer_v3",
        write_run(tmp_path / "b", "dreamer_v3", CURVE, [0.0, 0.5, 1.0], unimix=0.0): "no_unimix",
    }
    told = {"no_unimix": {"about": "No uniform share.", "changes": {"unimix": 0.0}}}
    report.write_report(tmp_path / "o", list(runs), comparison._checked({}), title="T", names=runs, ablations=told)
    text = Page((tmp_path / "o" / "report.html").read_text()).text
    assert "No uniform share." in text and "unimix = 0.0" in text and "0.83" in text  # (3 + 3 + 1.5) / 9


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compare"], "out: missing"),
        (["compare", "--out", "x", "--agents", "dreamer"], "agents: unknown name 'dreamer'"),
        (["compare", "--out", "x", "--agents", ","], "agents: missing"),
        (["compare", "--out", "x", "--seeds", "0"], "seeds: 0 is not valid"),
        (["compare", "--out", "x", "--first-seed", "-1"], "first_seed: -1 is not valid"),
        (["compare", "--out", "x", "--jobs", "0"], "jobs: 0 is not valid"),
        (["compare", "--out", "x", "--steps", "9", "--seconds", "9"], "steps, seconds: one of them"),
        (["compare", "--out", "x", "--threshold", "nan"], "threshold: nan is not valid"),
        (["compare", "--out", "x", "--runs", "none"], "'none' is not a run folder"),
        (["compare", "--out", "x", "--runs", "none", "--env", "catch"], "runs: they have their agents"),
        (["compare", "--out", "/dev/null"], "out: '/dev/null' is not a folder"),
        (["ablate", "--out", "x"], "agent: missing"),
        (["ablate", "dreamer", "--out", "x"], "agent: unknown name 'dreamer'"),
        (["ablate", "iris", "--out", "x", "--only", "no_such"], "only: unknown name 'no_such'"),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
