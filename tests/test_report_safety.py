"""Test the report on untrusted folders: damaged files, hostile names, extreme numbers."""

import json
import os
import re

import pytest
import yaml

from bnrnn.errors import readable
from bnrnn.plots.style import plt
from bnrnn.report import results
from bnrnn.report.document import Code, Figure, Link, Table, to_html, to_markdown
from bnrnn.report.report import document, write_report
from bnrnn.runs.find import find, find_runs
from bnrnn.runs.text import slug
from tests.run_folders import change, fail, make_run
from tests.test_report import Page

ANALYSIS = {
    "analysis": "lengths", "lengths": [10, 20], "batch_size": 5, "characters": 200,
    "bpc": {"population": [2.0, 1.9]},
    "of": {
        "task": "ptb", "data": "ptb", "data_title": "Penn", "model": "lstm", "model_title": "LSTM",
        "gamma_init": 0.1, "hidden_size": 1000, "seed": 0, "step": 100, "calibrated": None,
    },
}  # fmt: skip
ALIASES = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DAMAGE = {
    "empty": b"", "list": b"[]\n", "number": b"5\n", "object": b"{}\n", "null": b"null\n",
    "nan": b'{"step": NaN, "split": "valid", "seed": NaN}\n', "text": b'"text"\n',
    "deep": b"[" * 100_000 + b"]" * 100_000 + b"\n", "deep-object": b'{"a":' * 100_000 + b"\n",
    "not-utf8": b"\xff\xfe: \xff\n", "aliases": ALIASES.encode(), "control": b"\x00\x1b[31m\n",
    "huge-number": b'{"step": ' + b"9" * 5000 + b', "split": "valid"}\n',
    "many-digits": b'{"step": 1e999999, "split": "valid"}\n',
}  # fmt: skip
FILES = ["config.yaml", "run.json", "metrics.jsonl", "result.json", "failed.json", "analysis"]
# Not errors: a truncated last line, an empty file, a file without the keys that "unset" damages,
# and the result of mode=evaluate.
HARMLESS = {
    ("metrics.jsonl", "truncated"), ("metrics.jsonl", "empty"), ("failed.json", "unset"),
    ("analysis", "object"),
}  # fmt: skip


def damage(file, kind):
    content = file.read_bytes()
    file.unlink()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "unset":
        file.write_bytes(re.sub(rb'(name|split|task|step|seed)"?: [^,}\n]+', rb"\1", content))
    else:
        file.write_bytes(DAMAGE[kind])


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_run_or_analysis_is_a_row_of_its_own(bnrnn_here, tmp_path, every):
    """Damage each file in each way; by default in a third of the ways, different for each file."""
    kinds = [*DAMAGE, "truncated", "folder", "fifo", "loop", "unset"]
    outputs, expected, harmless = tmp_path / "outputs", [], 0
    for number, file in enumerate(FILES):
        for kind in kinds[number % every :: every]:
            folder = outputs / f"{file}-{kind}"
            if file == "analysis":
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps(ANALYSIS))
                damage(folder / "result.json", kind)
            else:
                make_run(folder, "lstm", [2.0, 1.5], task="pydocs")
                fail(folder, "an error")
                damage(folder / file, kind)
            if (file, kind) in HARMLESS:
                harmless += file != "analysis"
            else:
                expected.append(folder.name)
    make_run(outputs / "whole", "lstm", [2.0, 1.5], task="pydocs")
    done = bnrnn_here("mode=report")
    assert done.returncode == 0, done.stderr
    text = (outputs / "report" / "report.md").read_text()
    found = find(outputs)
    assert sorted(unreadable.path.name for unreadable in found.unreadable) == sorted(expected)
    for name in expected:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        state, _, _, reason = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[2:-1])
        assert (state, len(reason) > 10) == ("unreadable", True), row
        assert len(row) < 400
    assert len(found.runs) == harmless + 1
    for run in found.runs:
        assert f"\n| `{run.path.name}` | 1.375 bits per character |" in text


NAMES = [
    "../../../X", "/etc/passwd", "..", ".", "", "$x^{$", r"\$x^{$\frac",
    "<script>alert(1)</script>", "](javascript:alert(1))", "![x](y)", "a|b", "`code`",
    "\x1b[31mred", "a\x00b", "a\rb", "a\nb", "\u202eright to left", "_hidden", "a" * 300,
    "ünï 漢字 😀", "%2e%2e%2f", "&amp;", "# x", "con", "--option", "{0.__class__}", "{}", "%s",
]  # fmt: skip


def make_hostile(outputs, name, k):
    run = outputs / f"run{k}"
    make_run(run, "lstm", [2.0, 1.5], seed=k)
    metric = {"name": "bpc", "title": name, "lower_is_better": True, "unit": name}
    change(
        run / "run.json", task=name, data=name, data_title=name, description=name, model=name,
        model_title=name, metric=metric,
    )  # fmt: skip
    change(run / "result.json", command=name, machine=name, kernel=name, commits=[name], data=name)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["task"] |= {"name": name, name: name}
    settings["model"]["name"] = settings["scale"] = name
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    failed = outputs / f"failed{k}"
    make_run(failed, "lstm", [2.0], finished=False, seed=k)
    change(failed / "run.json", data=name, data_title=name)
    fail(failed, name)
    analysis = outputs / f"analysis{k}"
    analysis.mkdir()
    of = ANALYSIS["of"] | dict.fromkeys(
        ["task", "data", "data_title", "model", "model_title", "scale"], name
    )
    content = ANALYSIS | {"of": of, "bpc": {name: [2.0, 1.9], "population": [1.0, 1.0]}}
    (analysis / "result.json").write_text(json.dumps(content))


def everything(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def check_markdown(text):
    """Check that the Markdown is well formed and safe, and return the names of its pictures."""
    assert readable(text) == text
    lines = text.splitlines()
    for line in lines:
        unescaped = re.sub(r"\\.|(`+) ?.*? ?\1", "", line)
        assert "<" not in unescaped, line
        for target in re.findall(r"\]\(([^)]*)\)", unescaped):
            assert re.fullmatch(r"[\w.%/-]+", target, re.ASCII), line
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.sub(r"\\.", "", row).split("|")) for row in table.splitlines()}
        assert len(widths) == 1, table
    pictures = re.findall(r"\]\(figures/([\w.%-]+)\.png\)", text)
    assert len(set(pictures)) == len(pictures) > 0
    return pictures


# A path, an empty name, mathtext, HTML, Markdown, a table bar, a terminal escape, a long name.
SOME_NAMES = [
    "../../../X", "", "$x^{$<script>alert(1)</script>](javascript:alert(1))a|b\x1b[31mred",
    "a" * 300,
]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        SOME_NAMES,
        *(pytest.param(NAMES[k : k + 10], marks=pytest.mark.slow) for k in (0, 10, 20)),
    ],
    ids=["some", "0", "10", "20"],
)
def test_names_of_a_run_reach_no_other_file_and_no_reader_raw(bnrnn_here, tmp_path, names):
    outputs = tmp_path / "deep" / "down" / "here" / "outputs"
    for k, name in enumerate(names):
        make_hostile(outputs, name, k)
    before = everything(tmp_path)
    done = bnrnn_here("mode=report", f"outputs={outputs}")
    assert done.returncode == 0, done.stderr
    folder = outputs / "report"
    made = everything(tmp_path).keys() - before.keys()
    assert {path for path in made if folder not in path.parents} == set()
    assert everything(tmp_path).items() >= before.items()
    text = (folder / "report.md").read_text()
    pictures = check_markdown(text)
    assert "cannot be drawn" not in text
    assert len(list((folder / "figures").glob("*.svg"))) == len(pictures)
    page_text = (folder / "report.html").read_text()
    assert readable(page_text) == page_text
    page = Page(page_text)
    assert page.open == []
    assert "a" not in page.tags
    # Every script except the page's own, the last, is JSON, which the browser does not run.
    assert set(page.scripts[:-1]) == {"application/json"}
    assert page.scripts[-1] is None
    assert page.tags.count("img") == len(pictures)
    for k in range(len(names)):
        assert f"\n| `failed{k}` | failed |" in text

    # Copies of the runs are in folders named after the hostile names.
    results.collect(outputs, tmp_path / "results")
    made = everything(tmp_path).keys() - before.keys()
    roots = {folder, tmp_path / "results"}
    assert {path for path in made if not roots & set(path.parents)} == set()
    copies = find_runs(tmp_path / "results")
    assert len(copies) == 2 * len(names)
    # Copied again, every run gets the same folder.
    results.collect(outputs, tmp_path / "results")
    assert len(find_runs(tmp_path / "results")) == 2 * len(names)
    check_markdown(results.write(tmp_path / "results", figures=False))


def test_folders_with_names_that_are_no_text(bnrnn_here, tmp_path):
    for k, name in enumerate([b"\xff\xfe", b"](x)", b"a\nb", b"\x1b[31m", b"`a`|\\", b"<b>"]):
        folder = tmp_path / "outputs" / os.fsdecode(name)
        make_run(folder, "lstm", [2.0], finished=False, seed=k)
        (folder / "last.pt").touch()
        broken = tmp_path / "outputs" / os.fsdecode(b"broken" + name)
        make_run(broken, "lstm", [2.0])
        (broken / "result.json").write_text("{}")
    done = bnrnn_here("mode=report")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "outputs" / "report" / "report.md").read_text()
    check_markdown(text)
    assert (text.count("| stopped |"), text.count("| unreadable |")) == (6 + 6, 6)


RECORDS = {
    "none": [], "one": [(100, 1.5)], "null": [(100, None), (200, None)],
    "huge": [(100, 1e308), (200, -1e308), (300, 1.0)], "repeated": [(100, 1.0), (100, 2.0)],
    "backwards": [(300, 1.0), (200, 2.0), (100, 3.0)], "late": [(2**53, 1.0), (2**53 - 1, 2.0)],
    "first": [(0, 1.0)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("factor", "gamma"),
    [
        (1e308, False),
        (1.0, True),
        pytest.param(1.0, False, marks=pytest.mark.slow),
        pytest.param(1e308, True, marks=pytest.mark.slow),
    ],
)
def test_odd_numbers_do_not_stop_the_report(tmp_path, factor, gamma):
    for k, (name, points) in enumerate(RECORDS.items()):
        for seed in range(3):
            folder = tmp_path / f"{name}{seed}"
            make_run(folder, "bnlstm", [2.0], seed=seed, finished=seed > 0,
                     **{"model__gamma_init": 0.1 + k if gamma else 0.1})  # fmt: skip
            lines = [
                {"step": step, "split": split, "bpc": value}
                | ({"statistics": statistics} if statistics else {})
                for step, value in points
                for split, statistics in (
                    ("train", None), ("valid", "population"), ("valid", "batch"),
                )
            ]  # fmt: skip
            (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            metric = {"name": "bpc", "title": "bits", "lower_is_better": True, "factor": factor}
            change(folder / "run.json", metric=metric)
            if seed > 0:
                test = {"bpc": 1e308 if points else 0.0}
                change(folder / "result.json", test=test, steps=0, wall_seconds=1e308)
    write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "cannot be drawn" not in text
    assert max(map(len, text.splitlines())) < 2000
    results.main([tmp_path, tmp_path / "results"])


@pytest.mark.parametrize(
    "change_of_metric", [{"decimals": 10**9}, {"decimals": -1}, {"factor": "1"}, {"name": "other"}]
)
def test_a_metric_that_cannot_be_shown_makes_the_run_unreadable(tmp_path, change_of_metric):
    make_run(tmp_path / "a", "lstm", [2.0])
    subject = json.loads((tmp_path / "a" / "run.json").read_text())
    change(tmp_path / "a" / "run.json", metric=subject["metric"] | change_of_metric)
    write_report(tmp_path, tmp_path / "report")
    assert "| `a` | unreadable |" in (tmp_path / "report" / "report.md").read_text()


def test_a_figure_that_cannot_be_drawn_becomes_a_line(tmp_path, monkeypatch):
    make_run(tmp_path / "a", "lstm", [2.0])
    (tmp_path / "b").mkdir()
    odd = {"repeats": 1, "batch_size": 1, "hidden_size": 1, "noise": 0, "seed": 0, "gammas": []}
    band = {"matrix": "x", "gamma": 0.1, "median": [1], "lowest": [1], "highest": [1]}
    flow = {"analysis": "gradient_flow", "matrices": ["x"], "t": [0], "curves": [band]}
    (tmp_path / "b" / "result.json").write_text(json.dumps(flow | odd))
    write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "\nGradients through time: no figure, its numbers cannot be drawn (" in text
    assert [file.name for file in (tmp_path / "report" / "figures").glob("*.png")] == ["ptb.png"]
    assert plt.get_fignums() == []


def test_figures_of_data_with_like_names_keep_apart(tmp_path):
    for k, data in enumerate(["a/b", "a_b", "a:b"]):
        make_run(tmp_path / str(k), "lstm", [2.0], data=data)
    blocks = document(find(tmp_path), "", "", lambda run: run.path.name)
    names = [block.name for block in blocks if isinstance(block, Figure)]
    assert sorted(names) == ["a_b", "a_b-2", "a_b-3"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("γ 0.3", "gamma0.3"), ("released code's initialisation", "released_codes_initialisation"),
        ("../../../X", "_.._.._X"), ("..", "_"), ("", "_"), ("/etc/passwd", "_etc_passwd"),
        (".hidden", "hidden"), ("-rf", "rf"), ("text8-part", "text8-part"),
        ("a\x00\n\udcffb", "a_b"),
    ],
)  # fmt: skip
def test_a_slug_is_one_file_name(text, name):
    assert slug(text) == name


def test_long_names_stay_short_and_different(tmp_path):
    names = [slug(letter * 400 + end) for letter in ("a", "漢", "😀") for end in "xy"]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name.encode()) <= 60
        (tmp_path / f"{'-'.join([name] * 3)}.png").touch()


def test_links_and_code_keep_to_their_cell():
    link = Link("a](b) <c>", "runs/a b](c)\x1b<d>é")
    table = Table(
        ["x"],
        "l",
        [
            [link],
            [
                Code("a|b"),
            ],
            [Code("a\\|b")],
            [Code("")],
        ],
    )
    lines = to_markdown([table]).splitlines()
    assert lines[2] == r"| [a\](b) \<c\>](runs/a%20b%5D%28c%29%1B%3Cd%3E%C3%A9) |"
    assert lines[3:] == [r"| `a\|b` |", r"| a\\\|b |", "|  |"]
    page = Page(to_html("t", [table], {}))
    assert page.references == ["runs/a%20b%5D%28c%29%1B%3Cd%3E%C3%A9"]
    assert "a](b) <c>" in page.text
