"""Install and use the wheel and the sdist in new environments: `make release-check`.

For each Python, install the wheel with every extra and the sdist with none. Each has its own
environment and home folder. Then use the module and the command there.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ["model.hidden_size=8", "calibration_batches=2", "test_calibration_batches=2", "threads=1"]
MODULE = """
import time, torch, bnrnn
lstm, x = bnrnn.BNLSTM(28, 100), torch.randn(28, 64, 28)
began = time.monotonic()
output, (h_n, c_n) = lstm(x)
output.square().mean().backward()
print(f"{time.monotonic() - began:.1f}")
assert output.shape == (28, 64, 100), output.shape
assert lstm.active_kernel(False) == "cpu", lstm.active_kernel(False)
assert all(p.grad is not None and p.grad.isfinite().all() for p in lstm.parameters())
"""
_NOT_OLDEST = ("torch", "setuptools")
OWN_TORCH = "from importlib.metadata import version; print(version('torch'))"
VERSIONS = "import platform, torch; print(platform.python_version(), torch.__version__)"


class Environment:
    """A virtual environment, and a home folder for the programs that run in it."""

    def __init__(self, python: str, folder: Path, own_torch: bool) -> None:
        self.folder, self.bin, self.home = folder, folder / "venv" / "bin", folder / "home"
        self.home.mkdir()
        options = ["--system-site-packages"] if own_torch else []
        _call([python, "-m", "venv", *options, str(folder / "venv")], folder, os.environ)
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XDG_"))}
        variables.pop("TORCH_EXTENSIONS_DIR", None)
        self.variables = variables | {"HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def install(self, what: str, constraints: Path) -> float:
        """Install a package and return the seconds that it took."""
        began = time.monotonic()
        pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
        _call([*pip, what], self.folder, os.environ)
        return time.monotonic() - began

    def run(self, program: str, *arguments: str) -> str:
        return _call([str(self.bin / program), *arguments], self.home, self.variables)


def _call(command: list[str], folder: Path, variables: "os._Environ[str] | dict[str, str]") -> str:
    """Run a command and return its standard output.

    Raises:
        RuntimeError: the command fails; the message ends with the end of its output.
    """
    done = subprocess.run(command, cwd=folder, env=dict(variables), capture_output=True, text=True)
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{end}")
    return done.stdout


def oldest() -> str:
    """Constraints to the oldest versions that pyproject.toml allows, except of PyTorch.

    setuptools is excepted, too: PyTorch has its own bounds for it.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    allowed = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = re.findall(r"([\w-]+)>=([\d.]+)", " ".join(itertools.chain(*allowed)))
    return "\n".join(f"{name}=={version}" for name, version in bounds if name not in _NOT_OLDEST)


def check(python: str, package: Path, extras: str, versions: str) -> str:
    """Install and use the package.

    Args:
        versions: those of constraints.txt ("tested"); "own torch": the PyTorch that `python` has,
            and the newest of everything else, because constraints.txt goes with another PyTorch;
            "oldest": see `oldest`.

    Returns:
        one line with the versions and the times.
    """
    own_torch = versions == "own torch"
    with tempfile.TemporaryDirectory() as name:
        here = Environment(python, Path(name).resolve(), own_torch)
        constraints = here.folder / "constraints"
        tested = (ROOT / "constraints.txt").read_text()
        if own_torch:
            constraints.write_text(
                f"torch=={_call([python, '-c', OWN_TORCH], here.folder, os.environ)}"
            )
        elif versions == "oldest":
            (torch,) = re.findall(r"(?m)^torch==.*", tested)
            constraints.write_text(f"{torch}\n{oldest()}\n")
        else:
            constraints.write_text(tested)
        seconds = here.install(f"{package}{extras}", constraints)
        found_versions = here.run("python", "-c", VERSIONS).strip().replace(" ", ", torch ")

        version = package.name.split("-")[1].removesuffix(".tar.gz")
        assert here.run("bnrnn", "--version") == f"bnrnn {version}\n"
        first, second = (float(here.run("python", "-c", MODULE)) for _ in range(2))
        assert list(here.home.glob(".cache/bnrnn/*.so")), "the kernel is not in the user's cache"

        here.run("bnrnn", "max_steps=20", *TINY)
        (result,) = here.home.glob("outputs/pydocs/bnlstm/*/result.json")
        found = json.loads(result.read_text())
        assert (found["kernel"], found["steps"]) == ("cpu", 20), found
        here.run("bnrnn", "mode=data", "task=cnn4", "data.synthetic=150", "task.batch_size=20")
        (conf,) = here.folder.glob("venv/lib/python3*/site-packages/bnrnn/conf")
        assert _settings(conf) == _settings(ROOT / "conf")
        if extras:
            here.run("bnrnn", "-m", "hydra/launcher=joblib", "seed=1,2", "max_steps=2", *TINY)
            here.run("bnrnn", "hydra/launcher=submitit_slurm", "--cfg", "job")
            here.run("bnrnn", "mode=report")
            assert list(here.home.glob("outputs/report/**/*.svg")) or list(
                here.home.glob("outputs/report/**/*.png")
            )
        return (
            f"Python {found_versions}: installed in {seconds:.0f} s, kernel compiled in "
            f"{first - second:.0f} s"
        )


def _settings(conf: Path) -> list[str]:
    return sorted(str(path.relative_to(conf)) for path in conf.rglob("*.yaml"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="python3.12, or a path")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="what was built")
    parser.add_argument(
        "--own-torch", action="store_const", const="own torch", dest="versions", default="tested",
        help="use the PyTorch that each Python has, with the newest of everything else",
    )  # fmt: skip
    parser.add_argument(
        "--oldest", action="store_const", const="oldest", dest="versions",
        help="use the oldest versions that pyproject.toml allows of all but PyTorch",
    )  # fmt: skip
    parser.add_argument("--wheel-only", action="store_true", help="leave the sdist out")
    options = parser.parse_args()
    built = [list(options.dist.absolute().glob(pattern)) for pattern in ("*.whl", "*.tar.gz")]
    if [len(files) for files in built] != [1, 1]:
        parser.error(f"{options.dist} must have one wheel and one sdist: run make dist")
    (wheel,), (sdist,) = built
    used = [(wheel, "[all]")] if options.wheel_only else [(wheel, "[all]"), (sdist, "")]
    for package, _ in used:
        print(f"{package.name}: {package.stat().st_size / 1000:.0f} kB", flush=True)

    failed = False
    for python in options.pythons:
        for package, extras in used:
            try:
                how = check(python, package, extras, options.versions)
            except (AssertionError, OSError, RuntimeError) as error:
                failed, how = True, f"{python}: FAILED: {type(error).__name__}: {error}"
            print(f"{package.name}{extras}, {how}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
