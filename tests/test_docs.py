"""`make docs` builds the site without a warning, and its examples run."""

import re
import runpy
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

import bnrnn
from bnrnn.kernels import KERNELS
from tests.conftest import ROOT

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
SMALL = ["max_steps=4", "model.hidden_size=8", "calibration_batches=2", "max_valid_batches=2"]


class Page(HTMLParser):
    """The files a page loads, its links, and the names that can be linked to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads, self.links, self.names = [], [], set()
        self.tags = set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        self.names.add(found.get("id"))
        if tag in ("script", "img"):
            self.loads.append(found.get("src"))
        if tag == "link" and found.get("rel") == "stylesheet":
            self.loads.append(found["href"])
        if tag == "a":
            self.links.append(found.get("href"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "-o", "install", f"SITE={folder}", "docs"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    variable, _, *command = shlex.split(made.stdout.splitlines()[-1])
    built = subprocess.run(
        ["env", variable, sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def test_the_pages_need_no_network_and_their_links_lead_somewhere(site):
    pages = {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 10
    for path, page in pages.items():
        if path.name == "404.html":  # served at any path, so its links are absolute
            continue
        for target in filter(None, [*page.loads, *page.links]):
            if target.startswith("https://"):  # a link for readers, not a file to load
                assert target not in page.loads, (path, target)
                continue
            assert ":" not in target, (path, target)
            file, _, name = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), (path, target)
            if name and there in pages and name != "__skip":
                assert name in pages[there].names, (path, target)


def test_the_api_reference_has_what_the_library_exports(site):
    names = Page((site / "api.html").read_text("utf-8")).names
    for module, members in (
        ("nn.lstm", ("BNLSTM", "BNLSTM.forward", "BNLSTM.from_lstm", "BNLSTM.to_lstm")),
        ("nn.statistics", ("calibrate", "batch_statistics", "StepStatistics")),
        ("nn.synchronise", ("synchronise",)),
        ("nn.stabilizer", ("NormStabilizer", "norm_stabilizer")),
        ("nn.attentive_reader", ("AttentiveReader",)),
        ("nn.feature_norm", ("FeatureNorm",)),
        ("kernels", ("recurrence",)),
        ("kernels.reference", ("recurrence",)),
    ):
        assert {f"bnrnn.{module}.{member}" for member in members} <= names
    exported = {name.rpartition(".")[2] for name in names if name}
    assert {name for name in bnrnn.__all__ if not name.startswith("_")} <= exported


def test_equations_are_drawn_without_a_script(site):
    module = (site / "module.html").read_text("utf-8")
    assert "math" in Page(module).tags
    assert "arithmatex" not in module


# ---------------------------------------------------------------- docs/extending.md


def block(language, title=""):
    (found,) = re.findall(rf"```{language}{title}\n(.*?)```", EXTENDING, re.DOTALL)
    return found


def test_the_example_of_an_experiment(tmp_path, bnrnn_here):
    file = tmp_path / "mine" / "experiment" / "wide.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(block("yaml"))
    command = shlex.split(block("sh"))[1:]
    done = bnrnn_here(*command, *SMALL[2:])
    assert done.returncode == 0, done.stderr
    (config,) = tmp_path.glob("outputs/pydocs/bnlstm/*/config.yaml")
    settings = yaml.safe_load(config.read_text())
    assert (settings["model"]["hidden_size"], settings["optimizer"]["lr"]) == (64, 0.004)


def test_the_example_of_a_task(tmp_path):
    """In a separate process, because registering a task is permanent."""
    file = tmp_path / "parity.py"
    file.write_text(block("python", ' title="parity.py"'))
    command = [sys.executable, str(file), "task=sum", "model=bnlstm", *SMALL, "resume=auto"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test  accuracy" in done.stdout
    assert len(list(tmp_path.glob("outputs/sum/bnlstm/*/result.json"))) == 1


def test_the_example_of_a_kernel(tmp_path, monkeypatch):
    for name, entry in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, name, entry)
    monkeypatch.setitem(KERNELS, "counted", KERNELS["reference"])  # removed afterwards
    file = tmp_path / "counted.py"
    file.write_text(block("python", ' title="counted.py"'))
    assert runpy.run_path(str(file))["calls"] == 2
