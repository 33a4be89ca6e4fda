"""Speech frames and their classes, from Kaldi archives or from a hidden Markov model.

Only the names and sizes in an archive are kept in memory; an utterance is read when a batch
needs it.
"""

import logging
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from bnrnn.datasets.fetch import expand
from bnrnn.datasets.kaldi import Archive
from bnrnn.datasets.limits import read_file
from bnrnn.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Cmvn = Literal["none", "utterance", "speaker", "global"]
Moments = tuple[np.ndarray, np.ndarray]  # mean and standard deviation, (D,) float32 each

MOST_CLASSES = 100_000  # more is a mistake: damaged targets, or transition ids
MOST_SPEAKER_BYTES = 256 << 20  # size of utt2spk
NAMED = 5  # utterances named in a message
SAMPLED = 32  # utterances whose features enter the fingerprint


class FrameSplit(Protocol):
    """Utterances by number; lengths (n,) counts feature frames."""

    names: list[str]
    lengths: np.ndarray

    def features(self, number: int) -> np.ndarray:
        """(T, D) float32, finite."""
        ...

    def targets(self, number: int) -> np.ndarray:
        """(ceil(T / subsampling),) int32: the classes of frames 0, subsampling, 2 subsampling, …"""
        ...

    def speaker(self, number: int) -> str: ...


class Sources(NamedTuple):
    """The files of one split, and how messages refer to them."""

    features: str
    targets: str
    utt2spk: str | None
    prefix: str = "data."  # of the setting names, as in data.dev_features


@dataclass
class FrameCorpus:
    """The three splits of a speech corpus.

    features: D, the number of features in a frame. fingerprint: checksum of the names, lengths and
    targets of all utterances, and of the features of some.
    """

    train: FrameSplit
    dev: FrameSplit
    test: FrameSplit
    features: int
    classes: int
    fingerprint: str
    remarks: list[str] = field(default_factory=list)


def load_frames(
    train: Sources,
    dev: Sources,
    test: Sources,
    classes: int | None = None,
    subsampling: int = 1,
    pipes: bool = False,
) -> FrameCorpus:
    """Open the three splits and check that their features and targets match.

    Args:
        classes: the number of classes; None: the number that the training targets use.
        subsampling: frames per target (`frame_subsampling_factor` in Kaldi).
        pipes: run the commands that Kaldi would run, see `Archive`.

    Raises:
        ConfigError, DataError, OutputError: see `Archive`; or features and targets do not match.
    """
    splits = [ArchiveSplit(s, subsampling, pipes) for s in (train, dev, test)]
    of_train = splits[0]
    if classes is None:
        classes = of_train.largest + 1
        if classes > MOST_CLASSES:
            raise DataError(
                f"{train.prefix}targets: utterance {of_train.with_largest} has class "
                f"{of_train.largest}, more than a softmax can have; are these pdf ids? "
                "(ali-to-pdf makes them)"
            )
    for split in splits:
        if split.largest >= classes:
            raise DataError(
                f"{split.prefix}targets: utterance {split.with_largest} has class {split.largest}, "
                f"and there are {classes}, from 0; set task.classes to their number, or use "
                "targets of the same model"
            )
        if split.width != of_train.width:
            raise DataError(
                f"{split.prefix}features: utterance {split.names[0]} has {split.width} features a "
                f"frame, and {of_train.names[0]} of the training set has {of_train.width}; use "
                "features of the same kind"
            )
    remarks = [remark for split in splits for remark in split.remarks]
    for remark in remarks:
        log.warning("%s", remark)
    fingerprint = ", ".join(split.fingerprint for split in splits)
    return FrameCorpus(
        splits[0], splits[1], splits[2], of_train.width, classes, fingerprint, remarks
    )


def corpus_sources(folder: Path) -> tuple[Sources, Sources, Sources]:
    """Return the sources in `folder`: train, dev and test, each with feats.scp and ali.scp.

    A split may also have utt2spk.

    Raises:
        DataError: there is no such folder.
    """
    folder = expand(folder)
    found = []
    for name in ("train", "dev", "test"):
        part = folder / name
        if not (part / "feats.scp").exists():
            raise DataError(
                f"{part / 'feats.scp'} does not exist; data/kaldi.md in the sources says how to "
                "make it, data_dir=DIR where it is, and data.synthetic=N generates frames"
            )
        speakers = part / "utt2spk"
        found.append(
            Sources(
                f"scp:{part / 'feats.scp'}", f"scp:{part / 'ali.scp'}",
                str(speakers) if speakers.exists() else None, f"{name} ",
            )
        )  # fmt: skip
    return found[0], found[1], found[2]


class ArchiveSplit:
    """The utterances that have both features and targets, in the order of the features."""

    def __init__(self, sources: Sources, subsampling: int, pipes: bool) -> None:
        self.prefix = sources.prefix
        self._subsampling = subsampling
        self._features = Archive(sources.features, "matrix", f"{self.prefix}features", pipes)
        self._targets = Archive(sources.targets, "integers", f"{self.prefix}targets", pipes)
        self._speakers = (
            None
            if sources.utt2spk is None
            else read_speakers(sources.utt2spk, f"{self.prefix}utt2spk")
        )
        self.names = [name for name in self._features if name in self._targets]
        self.remarks = self._unpaired()
        if not self.names:
            raise DataError(
                f"no utterance of {self.prefix}features has a target in {self.prefix}targets: "
                "their utterances have other names"
            )
        self.width = self._features.columns[self.names[0]]
        self.lengths = np.array([self._length(name) for name in self.names], np.int64)
        self.largest, self.with_largest = -1, ""
        self.fingerprint = self._check_targets()

    def features(self, number: int) -> np.ndarray:
        name = self.names[number]
        found = self._features.read(name)[: self.lengths[number]]
        if not np.isfinite(found).all():
            frame = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
            raise DataError(
                f"{self.prefix}features: frame {frame} of utterance {name} is not finite; repair "
                "it or leave it out"
            )
        return found

    def targets(self, number: int) -> np.ndarray:
        used = -(-self.lengths[number] // self._subsampling)
        return self._targets.read(self.names[number])[:used]

    def speaker(self, number: int) -> str:
        name = self.names[number]
        if self._speakers is None:
            raise ConfigError(f"task.cmvn=speaker needs {self.prefix}utt2spk: Kaldi's utt2spk file")
        if name not in self._speakers:
            raise DataError(
                f"{self.prefix}utt2spk has no speaker of utterance {name}; complete it, or set "
                "task.cmvn"
            )
        return self._speakers[name]

    def _unpaired(self) -> list[str]:
        without = [name for name in self._features if name not in self._targets]
        spare = sum(name not in self._features for name in self._targets)
        remarks = []
        if without:
            named = ", ".join(without[:NAMED]) + ", …" * (len(without) > NAMED)
            remarks.append(
                f"{self.prefix}targets: {len(without):,} of {len(self._features):,} utterances "
                f"have no targets and are left out: {named}"
            )
        if spare:
            remarks.append(f"{self.prefix}features: {spare:,} targets have no features")
        return remarks

    def _length(self, name: str) -> int:
        """Return the number of frames with a target.

        Features and targets may differ by up to `subsampling` frames.
        """
        frames, targets = self._features.rows[name], self._targets.rows[name]
        width = self._features.columns[name]
        if frames == 0 or targets == 0:
            what = "features" if frames == 0 else "targets"
            raise DataError(
                f"{self.prefix}{what}: utterance {name} is empty; leave it out of the archive"
            )
        if width != self.width or width == 0:
            raise DataError(
                f"{self.prefix}features: utterance {name} has {width} features a frame, and "
                f"{self.names[0]} has {self.width}; use features of the same kind"
            )
        if abs(frames - targets * self._subsampling) > self._subsampling:
            raise DataError(
                f"utterance {name} has {frames} frames of {self.prefix}features and {targets} "
                f"of {self.prefix}targets, each of which stands for task.subsampling="
                f"{self._subsampling}: use the alignment of these features"
            )
        return min(frames, targets * self._subsampling)

    def _check_targets(self) -> str:
        """Read all targets and the features of some utterances; return the fingerprint."""
        check, step = 0, -(-len(self.names) // SAMPLED)
        for number, name in enumerate(self.names):
            targets = self._targets.read(name)
            if targets.min() < 0:
                raise DataError(
                    f"{self.prefix}targets: utterance {name} has class {targets.min()}; classes "
                    "are numbered from 0"
                )
            if targets.max() > self.largest:
                self.largest, self.with_largest = int(targets.max()), name
            check = zlib.crc32(f"{name} {self.lengths[number]} ".encode(), check)
            check = zlib.crc32(targets.tobytes(), check)
            if number % step == 0:
                check = zlib.crc32(self._features.read(name).tobytes(), check)
        return f"{len(self.names)} {check:08x}"


def read_speakers(file: str, setting: str) -> dict[str, str]:
    """Read Kaldi's utt2spk: utterance -> speaker.

    Raises:
        DataError: the file cannot be read, or a line does not have two words.
    """
    advice = f"set {setting} to a file of lines `utterance speaker`"
    content = read_file(expand(Path(file)), MOST_SPEAKER_BYTES, advice)
    if len(content) > MOST_SPEAKER_BYTES:
        raise DataError(f"{file} is larger than {MOST_SPEAKER_BYTES:,} bytes; {advice}")
    found: dict[str, str] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            words = line.decode("utf-8").split()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: line {number} is not UTF-8; {advice}") from error
        if not words:
            continue
        if len(words) != 2:
            raise DataError(f"{file}: line {number} has {len(words)} words; {advice}")
        found[words[0]] = words[1]
    return found


class Normalizer:
    """Cepstral mean and variance normalisation.

    Subtracts each feature's mean and divides by its standard deviation, computed over

        none:       nothing (features are not normalised)
        utterance:  the frames of the utterance
        speaker:    all frames of the speaker in the split, as Kaldi's
                    `apply-cmvn --norm-vars=true --utt2spk=…`
        global:     all frames of the training set, in one pass before the first batch

    A constant feature is only centred.
    """

    def __init__(self, kind: Cmvn, train: FrameSplit) -> None:
        self.kind: Cmvn = kind
        self._train = train
        self._by_speaker: dict[tuple[int, str], Moments] = {}
        self._members: dict[int, dict[str, list[int]]] = {}
        self.of_training: Moments | None = None  # for "global", once computed

    def features(self, split: FrameSplit, number: int) -> np.ndarray:
        """Return the normalised features of one utterance, (T, D) float32."""
        found = split.features(number)
        if self.kind == "none":
            return found
        if self.kind == "utterance":
            mean, deviation = _moments([found])
        elif self.kind == "speaker":
            mean, deviation = self._of_speaker(split, number)
        else:
            mean, deviation = self.global_moments()
        return (found - mean) / deviation

    def global_moments(self) -> Moments:
        if self.of_training is None:
            log.info("Mean and variance of the features, over the training set (task.cmvn=global)")
            train = self._train
            self.of_training = _moments(train.features(k) for k in range(len(train.names)))
        return self.of_training

    def _of_speaker(self, split: FrameSplit, number: int) -> Moments:
        members = self._members.get(id(split))
        if members is None:
            members = self._members[id(split)] = defaultdict(list)
            for k in range(len(split.names)):
                members[split.speaker(k)].append(k)
        key = (id(split), split.speaker(number))
        if key not in self._by_speaker:
            utterances = members[key[1]]
            self._by_speaker[key] = _moments(split.features(k) for k in utterances)
        return self._by_speaker[key]


def _moments(utterances: Iterable[np.ndarray]) -> Moments:
    """Compute mean and standard deviation over all frames of the utterances, in float64."""
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for frames in utterances:
        wide = frames.astype(np.float64)
        count += len(wide)
        total = total + wide.sum(0)
        squares = squares + np.square(wide).sum(0)
    mean = total / count
    variance = squares / count - np.square(mean)
    # The variance of a constant feature is only rounding error.
    constant = variance <= 1e-10 * (np.square(mean) + 1e-20)
    deviation = np.sqrt(np.where(constant, 1.0, variance))
    return mean.astype(np.float32), deviation.astype(np.float32)
