"""Every wrong command line gives a one-line error and starts nothing."""

import itertools
import os
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from bnrnn.command.arguments import _values, check
from bnrnn.command.modes import MODES
from bnrnn.runs.text import quoted
from bnrnn.settings.compose import as_override, literal

WRONG = """
optimizer.eps=-1                        | optimizer.eps must be positive, got -1.0
optimizer.lr=nan                        | optimizer.lr must be positive, got nan
optimizer.lr=inf                        | optimizer.lr must be a finite number, got inf
optimizer=rmsprop optimizer.eps=0       | optimizer.eps must be positive, got 0.0
model.hidden_size=100000000             | model.hidden_size must be 65536 or less
max_epochs=9007199254740993             | max_epochs must be 9007199254740992 or less
lengths.lengths=[1000000000000000000]   | lengths.lengths must be 9007199254740992 or less
threads=1000000                         | threads must be 1024 or less
model.gamma_init=1e39                   | model.gamma_init must be below 1e+38, got 1e+39
model.forget_bias=-1e39                 | model.forget_bias must be below 1e+38, got -1e+39
task=ptb_words model.init_range=1e39    | model.init_range must be below 1e+38
task=cnn4 data.synthetic=1000000000000  | data.synthetic must be 1000000 or less
sample.length=100000000000              | sample.length must be 10000000 or less
gradient_flow.hidden_size=100000000     | gradient_flow.hidden_size must be 65536 or less
gradient_flow.batch_size=100000000      | gradient_flow.batch_size must be 65536 or less
gradient_flow.repeats=1000000000000     | gradient_flow.repeats must be 65536 or less
task=cnn4 task.eval_batch_size=1 model=attentive_bnlstm | task.eval_batch_size must be 2 or more
sample.temperature=1e-310               | sample.temperature must be 1e-6 or more
lengths.lengths=[100,100]               | lengths.lengths must be different lengths
model.gamma_init=nan                    | model.gamma_init must be a finite number, got nan
model.forget_bias=nan                   | model.forget_bias must be a finite number, got nan
model.eps=inf                           | model.eps must be a finite number, got inf
task=mnist task.init_noise=inf          | task.init_noise must be a finite number, got inf
gradient_flow.gammas=[nan]              | gradient_flow.gammas must be positive, got nan
checkpoint_minutes=nan                  | checkpoint_minutes must be a finite number, got nan
task=null                               | there is no task=null; task may be an4, cnn, cnn4
task=                                   | there is no task=; task may be
model=1                                 | there is no model=1; model may be
model=[lstm]                            | there is no model=['lstm']; did you mean lstm?
task=../task/ptb                        | there is no task=../task/ptb; task may be
task=base_pixels                        | there is no task=base_pixels; task may be
experiment=by_task/official_code_ptb    | did you mean official_code?
@foo=1                                  | cannot read '@foo=1': settings are written key=value
task@foo=ptb                            | cannot read 'task@foo=ptb'
--resolve                               | --resolve goes with --cfg job
-m --cfg job                            | --cfg shows one job: leave out -m
--cfg=all task=ptb --multirun           | --cfg shows one job: leave out -m
--experimental-rerun X                  | there is no flag --experimental-rerun
--shell-completion                      | there is no flag --shell-completion
-sc foo                                 | there is no flag -sc
--run --multirun                        | there is no flag --run
--package foo                           | there is no flag --package
-c foo                                  | invalid choice: 'foo'
--cfg foo                               | --cfg: invalid choice: 'foo'; choose one of job
--cfg                                   | --cfg: invalid choice: ''
task=ptb -cd                            | -cd needs a folder
--config-dir=                           | --config-dir needs a folder
-m seed=range(0,3,0)                    | cannot read 'seed=range(0,3,0)'
-m seed=glob(*)                         | seed=glob(*) is an empty sweep
-m task=glob(zz*)                       | task=glob(zz*) is an empty sweep
-m seed=range(3,0)                      | seed=range(3,0) is an empty sweep
model=lstm,bnlstm                       | has several values: a sweep over them needs -m
~seed                                   | ~seed: a setting cannot be removed
~task.length                            | ~task.length: a setting cannot be removed
+seed=1                                 | seed is written without +
++seed=1                                | seed is written without +
+foo.bar=1                              | there is no setting 'foo.bar'
hydra.run.dir=x                         | hydra.run.dir is not a setting of bnrnn: outputs=DIR sets
hydra.output_subdir=../..               | hydra.output_subdir is not a setting of bnrnn
hydra/job_logging=default               | hydra/job_logging is not a setting of bnrnn
hydra/launcher=nope                     | there is no hydra/launcher=nope here
+hydra.callbacks.x.y=1                  | hydra.callbacks.x.y is not a setting of bnrnn
seed=null                               | seed must have a value, got 'null'
task.length=null                        | task.length must have a value, got 'null'
optimizer.lr=null                       | optimizer.lr must have a value, got 'null'
mode=null                               | mode must have a value, got 'null'
outputs=null                            | outputs must have a value, got 'null'
task.path=[a]                           | task.path must be text
data_dir=[]                             | data_dir must be text
data_dir=                               | data_dir must be a folder
resume=                                 | resume must be a folder
gradient_flow.gammas=3                  | gradient_flow.gammas must be a list, such as [1,2]
seed=[1]                                | seed must be an integer, got '[1]'
seed={a:1}                              | seed must be an integer
seed=${foo}                             | seed: there is no setting 'foo' to take the value of
seed=${oc.env:NO_SUCH}                  | seed: there is no environment variable NO_SUCH
seed=${                                 | cannot read 'seed=${'
device=cpu:7                            | device must be auto, cpu or cuda, got 'cpu:7'
device=mps                              | device must be auto, cpu or cuda, got 'mps'
run=A,B mode=evaluate                   | resume=DIR and run=DIR are for one run
-m run=A,B mode=evaluate                | resume=DIR and run=DIR are for one run
-m resume=1,2                           | resume=DIR and run=DIR are for one run
-m resume=range(1,3)                    | resume=DIR and run=DIR are for one run
run=[a] mode=evaluate                   | run must be text
scale=hour                              | scale=hour needs reproduce=NAME
question=x                              | question=FILE goes with mode=answer run=DIR
run=auto                                | run=DIR goes with mode=evaluate
task.path=book.txt                      | add task=text
model.recurrent_norm=sum                | model.input_norm must be none with recurrent_norm=sum
model=bn_sum task.batch_size=1          | task.batch_size must be 2 or more for model=bn_sum
task=ptb_characters model=lstm          | task=ptb_characters takes model=characters_lstm
task=cnn model=lstm                     | task=cnn takes model=attentive_…, not model=lstm
task=mnist model=attentive_lstm         | task=mnist takes model=lstm, bnlstm, bn_input…
"""
CASES = [[part.strip() for part in line.split("|")] for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize(("line", "message"), CASES, ids=[line for line, _ in CASES])
def test_one_line_says_what_is_wrong(line, message, tmp_path, bnrnn_here):
    done = bnrnn_here(*shlex.split(line))
    assert done.returncode == 2, done.stderr
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("bnrnn: error: ")]
    assert message in error
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


def test_a_sweep_prints_each_error_in_settings_once(bnrnn_here):
    done = bnrnn_here("-m", "seed=1,2,3", "max_steps=-1,-2")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"bnrnn: error: max_steps must be positive, got {steps}" for steps in (-1, -2)
    ]


def test_settings_may_be_before_and_after_a_flag(bnrnn_here):
    done = bnrnn_here("task=pydocs", "--cfg", "job", "max_epochs=3")
    assert "name: pydocs" in done.stdout
    assert "max_epochs: 3" in done.stdout


def test_every_mode_is_in_the_help(bnrnn_here):
    text = bnrnn_here("--help").stdout
    for mode in MODES.keys() - {"train"}:
        assert f"mode={mode}" in text


NAMES = [
    "plain", "ünï", "it's", '"dq"', "dollar$HOME", "back\\slash", "end\\", "a\\'b", "a${b}", "x,y",
    "[z]", "{k:v}", " space ", "#hash", "a=b", "new\nline", "*", "(x)", "null", "1",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_path_survives_the_shell_and_hydras_parser(name, tmp_path):
    (word,) = shlex.split(quoted(tmp_path / name), posix=True)
    for value, printed in ((str(tmp_path / name), word), (name, literal(name))):
        override = OverridesParser.create().parse_override(f"outputs={printed}")
        assert override.key_or_group == "outputs"
        if "$" not in name and "\\" not in name:  # OmegaConf interprets these; see the next test
            assert override.value() == value


# By default, test only the names that OmegaConf could interpret.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in ("1", "null") or set(name) & set('$\\"') else pytest.mark.slow
        )
        for name in NAMES
    ],
)
def test_a_printed_path_survives_the_shell_and_hydra(name, tmp_path, composed):
    (word,) = shlex.split(quoted(tmp_path / name), posix=True)
    config = composed(f"outputs={word}", f"data_dir={literal(name)}")
    assert (config.outputs, config.data_dir) == (str(tmp_path / name), name)


SPECIAL = ["\\", "${", "}", "'", '"', "oc.env:HOME", "\n"]


@pytest.mark.parametrize("size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_value_of_a_setting_survives_hydra_and_omegaconf(size):
    texts = ["".join(parts) for parts in itertools.product(SPECIAL, repeat=size)]
    texts += [before + "\\" * size + "${oc.env:HOME}" for before in ("", "a", "'", "${a} ")]
    for text in texts:
        for value in (text, [text, "b", text]):
            override = OverridesParser.create().parse_override(f"x={as_override(value)}")
            read = OmegaConf.create({"x": override.value()})
            assert OmegaConf.to_container(read, resolve=True) == {"x": value}


def test_a_home_folder_is_found(bnrnn_here, tmp_path, monkeypatch):
    home = tmp_path / "it's"
    monkeypatch.setenv("HOME", str(home))
    done = bnrnn_here("task=text", "task.path=~/none.txt", "outputs=~/runs")
    assert f"{home}/none.txt does not exist" in done.stderr
    done = bnrnn_here("-m", "task=text", "task.path=~/a,b,~/c")
    assert [line.split()[0] for line in done.stderr.splitlines()[:3]] == [
        f"{home}/a", "b", f"{home}/c"
    ]  # fmt: skip
    assert not list(tmp_path.rglob("~"))


@pytest.mark.parametrize("text", ["~", "~/x", "007", "1_0", "1e3", "-5", "true", "nan", "7."])
def test_a_text_is_what_the_shell_gave(text):
    for setting in ("sample.prompt", "model.title", "task.corpus", "outputs", "data.features"):
        path = setting in ("outputs", "data.features")
        value = os.path.expanduser(text) if path else text
        for given, expected in ((text, [value]), (f"{text},a,null", [value, "a", None])):
            (word,) = check(["task=frames", "-m", f"{setting}={given}"])[2:]
            override = OverridesParser.create().parse_override(word)
            assert [getattr(v, "text", v) for v in _values(override)] == expected
