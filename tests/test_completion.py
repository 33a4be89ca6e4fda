"""Test tab completion in bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def completed(line: str) -> set[str]:
    """Return the completions that bash offers, after the setup in docs/index.md."""
    (setup,) = [
        text for text in (ROOT / "docs" / "index.md").read_text().splitlines()
        if text.startswith("eval ")
    ]  # fmt: skip
    words = line.split(" ")
    script = f"""
        set -e
        {setup}
        complete -p bnrnn > /dev/null
        COMP_LINE={line!r} COMP_POINT={len(line)} COMP_CWORD={len(words) - 1}
        hydra_bash_completion
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_names_and_settings():
    assert completed("bnrnn task=ptb") == {"task=ptb", "task=ptb_characters", "task=ptb_words"}
    assert completed("bnrnn task=ptb model.gam") == {"model.gamma_init="}
