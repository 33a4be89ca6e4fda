"""Make run directories with exact numbers, for the tests of the report."""

import copy
import functools
import json

import yaml
from hydra.core.global_hydra import GlobalHydra

from bnrnn.settings.compose import compose_config
from bnrnn.settings.same import free_settings, to_dict

# The C dumper, if PyYAML has it, has the same output and is ten times as fast.
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
ACCURACY = {
    "name": "accuracy", "title": "accuracy", "lower_is_better": False, "unit": "%",
    "factor": 100.0, "decimals": 2,
}  # fmt: skip
ERROR = ACCURACY | {"name": "error", "title": "error", "lower_is_better": True}
BPC = {"name": "bpc", "title": "bits per character", "lower_is_better": True}
TITLES = {
    "ptb": "Penn Treebank, characters", "pydocs": "Python's documentation, the embedded corpus",
}  # fmt: skip


@functools.cache
def usual_settings(task, model):
    """Return the settings of `task=` and `model=` alone, the model title and the free settings."""
    GlobalHydra.instance().clear()
    required = ["task.path=FILE"] if task == "text" else []
    config = compose_config(f"task={task}", f"model={model}", *required)
    return to_dict(config), config.model.title, free_settings(config)


def make_run(
    folder, model, values, finished=True, task="ptb", seed=0, steps=None, test=None, data=None,
    data_title=None, **changes,
):  # fmt: skip
    """Make a run with validations 100 steps apart; with batch statistics, values are 1/4 higher.

    `changes` are settings, with two underscores for a dot.
    """
    folder.mkdir(parents=True)
    settings, model_title, free = copy.deepcopy(usual_settings(task, model))
    settings |= {"seed": seed, "data_dir": "/somewhere"}
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        part = settings[group] if group else settings
        assert name in part
        part[name] = value
    (folder / "config.yaml").write_text(yaml.dump(settings, Dumper=DUMPER))
    metric = ACCURACY if "mnist" in task else ERROR if "cnn" in task else BPC
    steps = steps or 100 * len(values)
    subject = {
        "task": task, "data": data or task,
        "data_title": data_title or TITLES.get(data or task, data or task),
        "description": "/somewhere/the.txt: 9 characters", "whole_data": True,
        "model": model, "model_title": model_title, "metric": metric, "steps_per_epoch": 50,
        "total_steps": steps if finished else 1000, "free_settings": free, "format": 1,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(subject))
    name = metric["name"]
    lines = [
        {"step": 100 * k, "split": "valid", "statistics": kind, name: value + shift, "seconds": k}
        for k, value in enumerate(values, start=1)
        for kind, shift in (("population", 0.0), ("batch", 0.25))
        if kind == "population" or model != "lstm"
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line).replace("NaN", "null") + "\n" for line in lines)
    )
    if finished:
        result = {
            "test": {name: values[-1] - 0.125 if test is None else test},
            "valid": {name: values[-1]}, "best_step": 100 * len(values), "calibrated": None,
            "task": task, "model": model, "seed": seed, "data": "/somewhere/the.txt: 9 characters",
            "whole_data": True, "steps": steps, "max_steps": steps, "epochs": 2.0,
            "wall_seconds": 90.0, "train_seconds": 60.0, "kernel": "reference", "bnrnn": "0",
            "commit": "abc", "python": "3", "torch": "2", "numpy": "2", "machine": "a machine",
            "threads": 2,
            "command": f"bnrnn task={task} model={model} data_dir=/somewhere threads=1",
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))


def change(file, **values):
    """Change some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def fail(folder, error):
    (folder / "failed.json").write_text(json.dumps({"error": error, "exit_code": 5}))
