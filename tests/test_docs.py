"""`make docs`: the API reference is built without a warning, and has what the library exports."""

import shlex
import subprocess

from pdoc.__main__ import cli

from tests.conftest import ROOT


def test_the_api_reference_is_built(tmp_path):
    made = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "-o", "install", f"DOCS={tmp_path}", "docs"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    _, *options = shlex.split(made.stdout.splitlines()[-1])
    assert options[:4] == ["-W", "error", "-m", "pdoc"]  # as pytest has it here
    cli(options[4:])
    for page, names in (
        ("nn/lstm", ("BNLSTM", "BNLSTM.forward", "BNLSTM.from_lstm", "BNLSTM.to_lstm")),
        ("nn/statistics", ("calibrate", "batch_statistics", "StepStatistics")),
        ("nn/stabilizer", ("NormStabilizer", "norm_stabilizer")),
        ("nn/attentive_reader", ("AttentiveReader",)),
        ("nn/feature_norm", ("FeatureNorm",)),
        ("kernels", ("recurrence", "KERNELS", "Weights")),
        ("kernels/reference", ("recurrence",)),
    ):
        html = (tmp_path / "bnrnn" / f"{page}.html").read_text("utf-8")
        assert [name for name in names if f'id="{name}"' not in html] == []
