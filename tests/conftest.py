import logging
import sys
from dataclasses import dataclass

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from bnrnn import cli  # noqa: F401 (registers the schemas)
from bnrnn import config as settings


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture
def composed():
    """The configuration that overrides make, as plain objects."""

    def compose_config(*overrides):
        GlobalHydra.instance().clear()
        with initialize_config_module("bnrnn.conf", version_base="1.3"):
            return settings.from_hydra(compose("config", list(overrides)))

    return compose_config


@dataclass
class InProcess:
    """The same command in this process: no second import of torch."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def bnrnn_here(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path / "cache"))
    # `main` sets it; the test after this one must not see it.
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments):
        from bnrnn.cli import main

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
