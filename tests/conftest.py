"""Fixtures shared by all tests: real data, seeds, and the command in this process."""

import copy
import functools
import gc
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import omegaconf.base
import pytest
import torch
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import grammar_parser

from bnrnn.kernels import operators
from bnrnn.settings.compose import compose_config as compose_settings
from bnrnn.settings.schema import Config

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("BNRNN_TEST_DATA") or ROOT / "data").absolute()
QUESTIONS = "cnn_qa/questions"


def missing_data(*names: str) -> str:
    """Return which data sets are not in DATA and how to get them; empty if none is missing.

    Args:
        names: folders of DATA: "mnist", "ptb", "text8", or `QUESTIONS`, the genuine questions,
            which cannot be downloaded.
    """
    missing = [name for name in names if not (DATA / name).is_dir()]
    if not missing:
        return ""
    fetched = [
        f"`bnrnn mode=data task={name}`" for name in missing if name not in (QUESTIONS, "an4")
    ]
    cure = "set BNRNN_TEST_DATA to a folder that has it"
    if fetched:
        cure += f" or run {' and '.join(fetched)}"
    return f"no {' or '.join(missing)} in {DATA}: {cure}"


def needs_data(*names: str) -> pytest.MarkDecorator:
    """Skip the test if these data sets are not in DATA."""
    reason = missing_data(*names)
    return pytest.mark.skipif(bool(reason), reason=reason)


def pytest_addoption(parser):
    parser.addoption(
        "--seeds", type=int, metavar="N", default=os.environ.get("BNRNN_TEST_SEEDS", "1"),
        help="repeat the numeric tests with N seeds (BNRNN_TEST_SEEDS)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the tests run in other processes, so this one need not import torch
    import torch

    # Set before triton is imported: without a GPU its kernels are interpreted, see
    # tests/test_triton_kernel.py.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    _read_conf_once()


def _read_conf_once() -> None:
    """Cache conf/: parsing it takes Hydra a third of the time of a small run."""
    Plugins.instance()  # registers the sources
    of_packages = SourcesRegistry.instance().resolve("pkg")
    load = of_packages.load_config

    @functools.cache
    def read(package: str, file: str) -> ConfigResult:
        return load(of_packages("tests", f"pkg://{package}"), file)

    def load_copy(source: ConfigSource, config_path: str) -> ConfigResult:
        result = copy.copy(read(source.path, config_path))
        result.provider, result.config = source.provider, copy.deepcopy(result.config)
        return result

    of_packages.load_config = load_copy
    omegaconf.base.parse = functools.cache(grammar_parser.parse)  # pyright: ignore (private there)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # exclude the objects imported so far from later collections


def pytest_generate_tests(metafunc):
    numeric = metafunc.definition.get_closest_marker("numeric")
    seeds = metafunc.config.getoption("seeds")
    if numeric and numeric.kwargs.get("repeat", True) and seeds > 1:
        metafunc.parametrize("seed", range(seeds), indirect=True)


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seed the random numbers of torch: with 0, and with the seeds that --seeds adds."""
    import torch

    number = getattr(request, "param", 0)
    torch.manual_seed(number)
    return number


@functools.cache
def _composed(*overrides: str) -> Config:
    GlobalHydra.instance().clear()
    return compose_settings(*overrides)


@pytest.fixture
def composed():
    """Return the configuration of some overrides as plain objects, cached for all tests."""
    return lambda *overrides: copy.deepcopy(_composed(*overrides))


@dataclass
class InProcess:
    """The result of a command that ran in this process, which avoids another import of torch."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def bnrnn_here(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path / "cache"))
    # `main` sets these; restore them after the test.
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def run(*arguments):
        from bnrnn.command.cli import main

        monkeypatch.setattr(sys, "argv", ["bnrnn", *map(str, arguments)])
        handlers = logging.root.handlers[:]
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        finally:
            for handler in set(logging.root.handlers) - set(handlers):
                logging.root.removeHandler(handler)
                handler.close()
        return InProcess(code, *capfd.readouterr())

    return run


@pytest.fixture
def built_kernel():
    """The CPU kernel is built; afterwards the number of threads is as before."""
    operators.load()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
