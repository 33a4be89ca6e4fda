"""Test the commands in the README and docs/, and their numbers against `results/`."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bnrnn.report import readme
from bnrnn.runs.find import find_runs
from tests.conftest import DATA, QUESTIONS, ROOT, needs_data
from tests.run_folders import change, make_run

PAGES = {page: page.read_text() for page in readme.pages(ROOT)}
README = PAGES[ROOT / "README.md"]


def commands_of(program):
    """The commands in the pages, in blocks of code or in a line; test_docs.py tests extending.md.

    A command goes up to a comment; a backslash continues it on the next line.
    """
    found = []
    for page, text in PAGES.items():
        if page.name == "extending.md":
            continue
        text = re.sub(r"\\\n *", "", text)
        blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        found += re.findall(rf"^{program} .*$", "\n".join(blocks), re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        found += [" ".join(code.split()) for code in re.findall(rf"`({program} [^`]+)`", prose)]
    return list(dict.fromkeys(command.partition("  #")[0].strip() for command in found))


COMMANDS = commands_of("bnrnn")
# test_processes.py tests two machines.
LAUNCHED = [command for command in commands_of("torchrun") if "--nnodes" not in command]
QUESTION = DATA / QUESTIONS / "000021e9748578a514493c773809465c661a28d1.question"
SMALL = ["max_steps=2", "calibration_batches=2", "max_valid_batches=2", "model.hidden_size=8"]
CHARACTERS = [*SMALL, "task.batch_size=500", "task.length=10", "task.stream_length=50000"]


def arguments(command, run, reader, board):
    """Return the command's arguments, reduced in size, with FILE, STAMP and DIR filled in."""
    for stamp, folder in (("ptb/bnlstm", run), ("cnn4/attentive_bne_star_star", reader)):
        command = command.replace(f"outputs/{stamp}/STAMP", str(folder))
    words = shlex.split(command)[1:]
    if "hydra/launcher=submitit_slurm" in words:  # submitit's local executor replaces Slurm here
        slurm_alone = ("partition", "signal_delay_s", "max_num_timeout", "gpus_per_node")
        words = [
            w for w in words if not w.startswith(tuple(f"hydra.launcher.{k}" for k in slurm_alone))
        ]
        words = [w.replace("submitit_slurm", "submitit_local") for w in words]
        words = [w.replace("seed=0,1,2", "seed=0").replace("node=4", "node=2") for w in words]
    words = [word.replace("question=FILE", f"question={QUESTION}") for word in words]
    path = f"task.path={ROOT / 'LICENSE'}"
    words = [path if word.startswith("task.path=") else word for word in words]
    if "mode=leaderboard" in words:
        return [*words, f"outputs={board}"]
    if "mode=report" in words:
        return [*words, f"outputs={run.parent.parent.parent}"]
    if "--help" in words or any(word.startswith("run=") for word in words):
        return words
    if any(word.startswith("resume=/") for word in words):
        return [*words, "max_steps=3"]
    if any(word in ("task=frames", "task=an4") for word in words):
        small = [*SMALL, "model.num_layers=2", f"data_dir={DATA}"]
        return [*words, *small]
    if any(word.startswith("task=cnn") for word in words):
        # The corpus cannot be downloaded, so use generated questions.
        words = [word for word in words if not word.startswith("data.synthetic")]
        return [*words, *SMALL, "data.synthetic=300", "task.batch_size=20"]
    if "task=ptb_words" in words:
        return [*words, f"data_dir={DATA}", *SMALL, "test_calibration_batches=2"]
    small = [*SMALL, "task.batch_size=5000"] if "mnist" in command else CHARACTERS
    return [*words, f"data_dir={DATA}", *small]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run on Penn Treebank."""
    folder = tmp_path_factory.mktemp("run")
    command = [
        sys.executable,
        "-m",
        "bnrnn",
        "task=ptb",
        "model=bnlstm",
        f"data_dir={DATA}",
        *CHARACTERS,
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return next(folder.glob("outputs/ptb/bnlstm/*"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A small finished Attentive Reader."""
    folder = tmp_path_factory.mktemp("reader")
    small = [*SMALL, "data.synthetic=300", "task.batch_size=20"]
    command = ["-m", "bnrnn", "task=cnn4", "model=attentive_bne_star_star", *small]
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    return next(folder.glob("outputs/cnn4/*/*"))


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """Runs of enough models for a leaderboard."""
    folder = tmp_path_factory.mktemp("board")
    for model in ("lstm", "bnlstm", "lnlstm"):
        make_run(folder / model, model, [2.0, 1.5])
    return folder


def test_the_readme_is_short():
    assert README.count("\n") <= 150


def test_the_pages_have_the_commands_of_every_task():
    assert {
        "pmnist_official",
        "pmnist",
        "mnist",
        "ptb",
        "text8",
        "pydocs",
        "text",
        "cnn",
        "cnn4",
        "ptb_characters",
        "ptb_words",
        "frames",
        "an4",
    } <= {
        word.removeprefix("task=")
        for command in COMMANDS
        for word in command.split()
        if word.startswith("task=")
    }


@pytest.mark.slow
@needs_data("mnist", "ptb", "text8", "an4", QUESTIONS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_bnrnn_command(command, run, reader, board, bnrnn_here):
    done = bnrnn_here(*arguments(command, run, reader, board))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_data("ptb")
@pytest.mark.parametrize("command", LAUNCHED)
def test_every_torchrun_command(command, tmp_path):
    words = shlex.split(re.sub("node=[0-9]", "node=2", command.replace("$(which bnrnn)", "BNRNN")))
    words = [str(Path(sys.executable).with_name("bnrnn")) if w == "BNRNN" else w for w in words[1:]]
    words = [sys.executable, "-m", "torch.distributed.run", *words, f"data_dir={DATA}"]
    small = [word.replace("length=10", "length=9") for word in CHARACTERS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, *small, "test_calibration_batches=2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "test  bpc" in done.stdout


def test_the_library_example():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(example, scope)
    assert scope["output"].shape == (80, 1, 100)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the exporters
def test_the_exporting_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = PAGES[ROOT / "docs" / "from-lstm.md"]
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope = {}
    exec(example, scope)
    assert (tmp_path / "lstm.onnx").exists()
    x = scope["x"]
    torch.testing.assert_close(scope["program"].module()(x)[0], scope["lstm"](x)[0])


def test_the_numbers_are_those_of_the_results():
    found = []
    for page, text in PAGES.items():
        names = re.findall(r"<!-- results: (\w+) -->", text)
        assert text.count("<!-- end of results -->") == len(names)
        up = "../" * (page.parent != ROOT)
        assert readme.refreshed(text, ROOT / "results", f"{up}results") == text
        found += names
    assert sorted(found) == [
        "experiments", "experiments", "families", "family", "gpu", "speed",
    ]  # fmt: skip


def test_our_result_names_its_length(tmp_path):
    """Runs of the same length count, else the longest, in any precision, but no other settings."""

    def ours(data="ptb", model="bnlstm"):
        return readme.ours(find_runs(tmp_path), data, model)

    assert ours() == "not run yet"
    make_run(tmp_path / "small", "bnlstm", [2.0], test=1.9, model__hidden_size=8)
    assert ours() == "[only with other settings](results/README.md)"
    make_run(tmp_path / "lstm", "lstm", [1.5], test=1.399)
    make_run(tmp_path / "bnlstm", "bnlstm", [1.5], test=1.332)
    assert ours() == "1.332 bits per character (LSTM 1.399) after 2 epochs"
    make_run(tmp_path / "longer", "bnlstm", [1.5, 1.4], test=1.328, precision="tf32")
    result = json.loads((tmp_path / "longer" / "result.json").read_text())
    (tmp_path / "longer" / "result.json").write_text(json.dumps(result | {"epochs": 19.8101}))
    assert ours() == "1.332 bits per character (LSTM 1.399) after 2 epochs"
    shutil.rmtree(tmp_path / "bnlstm")
    assert ours() == "1.328 bits per character after 19.8 epochs (LSTM 1.399 after 2)"
    make_run(tmp_path / "longest", "lstm", [1.5, 1.4, 1.4], test=1.375)
    change(tmp_path / "longest" / "result.json", epochs=30.0)
    assert ours() == "1.328 bits per character after 19.8 epochs (LSTM 1.375 after 30)"


def test_the_table_of_the_family(tmp_path):
    """The best settings of each model, and the steps to the LSTM's best validation."""
    for seed, test in ((0, 1.5), (1, 1.6)):
        folder = tmp_path / "runs" / f"zoneout{seed}"
        make_run(folder, "zoneout", [2.0, 1.25], task="pydocs", seed=seed, test=test)
    worse = tmp_path / "runs" / "worse"
    make_run(worse, "zoneout", [3.0, 3.0], task="pydocs", test=2.9, optimizer__lr=0.5)
    make_run(tmp_path / "runs" / "lstm", "lstm", [2.0, 1.75, 1.5], task="pydocs", test=1.7)
    rows = [f"| x | `model={name}` | ? | ? |" for name in ("zoneout", "lstm", "lnlstm")]
    text = "\n".join(["<!-- results: family -->", *rows, "<!-- end of results -->"])
    assert readme.refreshed(text, tmp_path).splitlines()[1:-1] == [
        "| x | `model=zoneout` | 1.550 (1.500 to 1.600) | 200 |",
        "| x | `model=lstm` | 1.700 | 300 |",
        "| x | `model=lnlstm` | not run yet | - |",
    ]


def test_a_table_for_each_data_set_of_the_family(tmp_path):
    """Settings with more seeds than the best ones have a row below it."""
    for data, best in (("text-text8-1m", 1.5), ("pydocs", 1.25), ("ptb", 1.0)):
        title = {"text-text8-1m": "The text text8-1m"}.get(data)
        common = {"task": "pydocs", "data": data, "data_title": title}
        runs = tmp_path / "runs" / data
        for seed, last in enumerate((best, best + 0.25)):
            make_run(runs / f"l{seed}", "lstm", [4.0, best, last], seed=seed, **common)
        make_run(runs / "b", "bnlstm", [2.0, 0.5], optimizer__lr=0.008, **common)
        for seed in range(3):
            make_run(runs / f"b{seed}", "bnlstm", [2.0, 0.75], seed=seed, **common)
        if data != "ptb":  # with two models, there is no table
            make_run(runs / "z", "zoneout", [3.0, 2.0], **common)
    text = "<!-- results: families -->\nold\n<!-- end of results -->\n"
    made = readme.refreshed(text, tmp_path)
    assert re.findall("^### (.*)", made, re.MULTILINE) == [
        "The text text8-1m", "Python's documentation, the embedded corpus",
    ] or re.findall("^### (.*)", made, re.MULTILINE) == [
        "Python's documentation, the embedded corpus", "The text text8-1m",
    ]  # fmt: skip
    part = made.partition("### The text text8-1m\n")[2].partition("\n### ")[0]
    assert "Steps until validation reaches 1.625, the mean over seeds of the LSTM's best." in part
    assert [line for line in part.splitlines() if line.startswith("| ")] == [
        "| model | test, bits per character | seeds | steps | steps to the LSTM's best "
        "| learning rate |",
        "| BN-LSTM | 0.375 | 1 | 200 | 200 | 0.008 |",
        "| BN-LSTM | 0.625 (0.625 to 0.625) | 3 | 200 | 200 | 0.002 |",
        "| LSTM | 1.500 (1.375 to 1.625) | 2 | 300 | 200 | 0.002 |",
        "| LSTM, zoneout | 1.875 | 1 | 200 | not reached | 0.002 |",
    ]
    assert readme.refreshed(made, tmp_path) == made


def test_our_result_is_the_mean_over_the_seeds(tmp_path):
    for seed, test in enumerate((1.3, 1.4, 1.5)):
        make_run(tmp_path / f"b{seed}", "bnlstm", [2.0, 1.5], seed=seed, test=test)
        make_run(tmp_path / f"l{seed}", "lstm", [2.0, 1.5], seed=seed, test=test + 0.1)
    make_run(tmp_path / "shorter", "bnlstm", [2.0], seed=3, test=9.0)
    found = readme.ours(find_runs(tmp_path), "ptb", "bnlstm")
    assert found == "1.400 bits per character (LSTM 1.500) after 2 epochs, three seeds"
    (tmp_path / "l0" / "result.json").unlink()
    for name in ("b0", "b1", "b2", "l1", "l2"):
        change(tmp_path / name / "result.json", epochs=50.0)
    found = readme.ours(find_runs(tmp_path), "ptb", "bnlstm")
    assert found == "1.400 bits per character (LSTM 1.550), three seeds (LSTM two)"


def test_the_row_of_the_family(tmp_path):
    """The best settings of both models, not the usual ones."""
    text = (
        "<!-- results: experiments -->\n| `bnrnn experiment=family task=pydocs` | - | | 1 |\n"
        "<!-- end of results -->\n"
    )
    assert "| not run yet | 1 |" in readme.refreshed(text, tmp_path)
    for model, test in (("lstm", 1.75), ("bnlstm", 1.5)):
        for rate in (2e-3, 4e-3):
            make_run(tmp_path / "runs" / f"{model}{rate}", model, [2.0, test / (1000 * rate)],
                     task="pydocs", optimizer__lr=rate, test=test + rate)  # fmt: skip
    assert (
        "| BN-LSTM 1.504 bits per character (LSTM 1.754), each at its best settings | 1 |"
    ) in readme.refreshed(text, tmp_path)


def test_every_make_target_is_one():
    for target in set(re.findall(r"`?make ([a-z0-9-]+)", "".join(PAGES.values()))):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_every_file_it_points_to_is_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), target


def test_the_compared_models_are_those_of_the_experiment():
    sweep = yaml.safe_load((ROOT / "conf/experiment/family.yaml").read_text())["hydra"]["sweeper"]
    assert set(readme._MODELS) == set(sweep["params"]["model"].split(","))
