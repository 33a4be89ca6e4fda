"""Random kills, concurrent commands and damaged files, compared with uninterrupted runs.

    python -m tests.stress [--minutes 10] [--seed N]

It prints its seed, which reproduces the choices, and how many rounds it tried and survived. Exit
code 1: a run ended with other numbers, a traceback was printed, or a finished run was lost.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bnrnn.runs.find import find_runs

SETTINGS = [
    "task=text", "task.path=book.txt", "model=bnlstm", "model.num_layers=2", "model.dropout=0.3",
    "model.hidden_size=8", "task.length=20", "task.batch_size=8", "max_steps=60",
    "validate_every=7", "log_every=3", "calibration_batches=2", "checkpoint_minutes=0.0005",
    "threads=1",
]  # fmt: skip
FILES = ("config.yaml", "run.json", "metrics.jsonl", "result.json", "last.pt", "best.pt")
LONGEST = 240  # seconds for one command


class Stress:
    """One folder, one text, and the results of uninterrupted runs of two seeds."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.tried: Counter[str] = Counter()
        self.failed: list[str] = []
        words = ["time", "step", "gate", "cell", "state", "batch", "moments", "and", "noise"]
        lines = (" ".join(chance.choices(words, k=8)) for _ in range(150))
        (folder / "book.txt").write_text("\n".join(lines))
        self.longest = 0.0
        self.expected = {seed: self._uninterrupted(seed) for seed in (0, 1)}

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "BNRNN_CACHE_DIR": str(self.folder / "cache"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "bnrnn", *SETTINGS, *arguments], cwd=self.folder,
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def end(self, started: subprocess.Popen[bytes]) -> int:
        """Wait, and return the exit code; a traceback or a hang is a failure."""
        try:
            errors = started.communicate(timeout=LONGEST)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            started.kill()
            errors = started.communicate()[1].decode(errors="replace") + "Traceback: it hung"
        if "Traceback" in errors:
            self.failed.append(errors[-2000:])
        return started.returncode

    def _uninterrupted(self, seed: int) -> dict:
        began = time.monotonic()
        assert self.end(self.start(f"seed={seed}", "outputs=whole")) == 0, self.failed
        self.longest = max(self.longest, time.monotonic() - began)
        (run,) = (run for run in find_runs(self.folder / "whole") if run.seed == seed)
        return self.numbers(run.path)

    @staticmethod
    def numbers(path: Path) -> dict:
        """Return what two equal runs have in common: everything except times."""
        result = json.loads((path / "result.json").read_text())
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return {
            **{key: result[key] for key in ("valid", "test", "steps", "best_step")},
            "records": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        }

    def check(self, what: str, outputs: str, seed: int, count: int = 1) -> None:
        runs = [run for run in find_runs(self.folder / outputs) if run.seed == seed]
        if len(runs) != count or any(self.numbers(r.path) != self.expected[seed] for r in runs):
            self.failed.append(f"{what}: not the uninterrupted run in {self.folder / outputs}")

    # ------------------------------------------------------------ the tests

    def kill(self, outputs: str) -> None:
        """Send signals at random times until the run has finished."""
        seed = self.chance.choice((0, 1))
        for _ in range(self.chance.randint(1, 4)):
            started = self.start(f"seed={seed}", f"outputs={outputs}", "resume=auto")
            try:
                started.wait(self.chance.uniform(0.0, 1.2) * self.longest)
            except subprocess.TimeoutExpired:
                kinds = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
                started.send_signal(self.chance.choice(kinds))
            self.end(started)
            self.tried["signals"] += 1
        if self.end(self.start(f"seed={seed}", f"outputs={outputs}", "resume=auto")) != 0:
            self.failed.append(f"kill: {outputs} did not go on")
        else:
            self.check("kill", outputs, seed)

    def collide(self, outputs: str) -> None:
        """Run several commands at once: equal settings with and without resume=auto, and others."""
        alike = [self.start("seed=0", f"outputs={outputs}", "resume=auto") for _ in range(2)]
        apart = [self.start("seed=1", f"outputs={outputs}") for _ in range(2)]
        codes = [self.end(started) for started in (*alike, *apart)]
        self.tried["collisions"] += 1
        if sorted(codes[:2]) not in ([0, 0], [0, 6]) or codes[2:] != [0, 0]:
            self.failed.append(f"collide: exit codes {codes} in {outputs}")
        self.check("collide", outputs, 0)
        self.check("collide", outputs, 1, count=2)

    def damage(self, outputs: str) -> None:
        """Truncate, change, empty or replace a file of a finished run; resuming must report it."""
        assert self.end(self.start("seed=0", f"outputs={outputs}")) == 0
        (run,) = find_runs(self.folder / outputs)
        path = run.path / self.chance.choice(FILES)
        content = bytearray(path.read_bytes())
        path.unlink()
        how = self.chance.choice(("cut", "flipped", "emptied", "noise", "folder", "FIFO", "link"))
        if how == "folder":
            path.mkdir()
        elif how == "FIFO":
            os.mkfifo(path)
        elif how == "link":
            path.symlink_to(path.name)
        else:
            place = self.chance.randrange(len(content))
            if how == "flipped":
                content[place] ^= 1 << self.chance.randrange(8)
            path.write_bytes({
                "cut": bytes(content[:place]), "flipped": bytes(content), "emptied": b"",
                "noise": self.chance.randbytes(len(content)),
            }[how])  # fmt: skip
        code = self.end(self.start("seed=0", f"outputs={outputs}", "resume=auto", "max_steps=65"))
        self.tried["damages"] += 1
        if code not in (0, 2, 4, 6) or len(list(run.path.parent.iterdir())) != 1:
            self.failed.append(f"damage: {path.name} {how}, exit code {code} in {outputs}")
        report = subprocess.run(
            [sys.executable, "-m", "bnrnn", "mode=report", f"outputs={outputs}"],
            cwd=self.folder, capture_output=True, timeout=LONGEST,
        )  # fmt: skip
        if report.returncode not in (0, 4) or b"Traceback" in report.stderr:
            self.failed.append(f"report on {path.name} {how}: {report.stderr.decode()[-1000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    ends = time.monotonic() + 60 * options.minutes
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="bnrnn-stress-") as name:
        stress = Stress(Path(name), chance)
        kinds: list[Callable[[str], None]] = [stress.kill, stress.kill, stress.damage,
                                              stress.damage, stress.collide]  # fmt: skip
        rounds = survived = 0
        while time.monotonic() < ends:
            before = len(stress.failed)
            chance.choice(kinds)(f"outputs-{rounds}")
            rounds += 1
            survived += len(stress.failed) == before
            counts = ", ".join(f"{n} {what}" for what, n in sorted(stress.tried.items()))
            print(f"tried {rounds} ({counts}), survived {survived}", flush=True)
        for failure in stress.failed:
            print(f"\nFAILED {failure}", file=sys.stderr)
    sys.exit(bool(stress.failed))


if __name__ == "__main__":
    main()
