"""Compare pyproject.toml with the files and versions in the repository."""

import fnmatch
import re
import tomllib
from pathlib import Path

import yaml

import bnrnn

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]


def test_every_package_and_data_file_is_in_the_wheel():
    missing = []
    for path in (ROOT / "bnrnn").rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        package = ".".join(path.relative_to(ROOT).parent.parts)
        patterns = SETTINGS["package-data"].get(package, [])
        packed = path.suffix == ".py" or any(fnmatch.fnmatch(path.name, p) for p in patterns)
        if package not in SETTINGS["packages"] or not packed:
            missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    heading = re.search(r"(?m)^## (\S+), (\S+)$", changes)
    assert heading is not None
    assert heading.groups() == (project["version"], str(citation["date-released"]))
    assert citation["version"] == project["version"] == bnrnn.__version__


def test_the_extra_all_has_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras["all"] == [f"bnrnn[{','.join(name for name in extras if name != 'all')}]"]
