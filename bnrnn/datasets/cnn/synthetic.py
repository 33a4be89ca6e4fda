"""Generated questions in the layout of the CNN corpus, for tests and trials without the real one.

An article states facts, relation(subject, object), about entities whose numbers are redrawn for
each article. Every fact has one of several wordings, among sentences that state no fact. The
question states one of the facts in another wording, with `@placeholder` for one of its two
entities. To answer it, a model has to find the relation and the other entity in the passage: every
relation in an article has several facts, and every entity occurs in several sentences. Some
subjects are named only in another sentence ("@entity3 is the senator from @entity7 . … the senator
from @entity7 visited @entity9 .", or a pronoun after a sentence about the person).

The wordings and word lists are in synthetic.yaml.
"""

import gzip
import hashlib
import io
import logging
import os
import random
import tarfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from bnrnn import progress
from bnrnn.datasets.cnn.archive import read_archive
from bnrnn.datasets.cnn.questions import ENTITY, PLACEHOLDER, SPLITS, Question, format_question
from bnrnn.datasets.staging import check_may_write, clean, publish, staging
from bnrnn.errors import DataError, OutputError, printable

log = logging.getLogger(__name__)

MARK = b"Synthetic questions made by bnrnn: no real articles.\n"
VERSION = 1  # of the articles; increase it when they change
ENTITIES = 500
LEAST = 50  # questions per split
MAX_TOKENS = 700
PERSON, PLACE, COMPANY, TEAM = "person", "place", "company", "team"


class Relation(NamedTuple):
    """wordings: with {s} for the subject and {o} for the object."""

    subject: str
    object: str
    wordings: tuple[str, ...]


class Grammar(NamedTuple):
    """The content of synthetic.yaml, which documents every part."""

    relations: tuple[Relation, ...]
    roles: tuple[str, ...]
    when: tuple[str, ...]
    saying: tuple[str, ...]
    bearing: tuple[str, ...]
    mentioning: tuple[str, ...]
    filling: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    adverbs: tuple[str, ...]


@cache
def grammar() -> Grammar:
    """Load synthetic.yaml once."""
    text = files("bnrnn.datasets.cnn").joinpath("synthetic.yaml").read_text("utf-8")
    parts: dict[str, Any] = yaml.safe_load(text)
    relations = tuple(
        Relation(kind["subject"], kind["object"], tuple(kind["wordings"]))
        for kind in parts.pop("relations")
    )
    lists = {
        name: tuple(part.split() if isinstance(part, str) else part) for name, part in parts.items()
    }
    return Grammar(relations, **lists)


class _Fact(NamedTuple):
    relation: Relation
    subject: str
    object: str


class _Sentence(NamedTuple):
    words: list[str]
    fact: _Fact | None = None
    wording: str = ""


def generate(path: Path, n: int, seed: int = 0) -> None:
    """Write n generated questions to `path`, a .tgz of `cnn/questions/<split>/<sha1>.question`.

    Validation and test have 5 % each, but every split has at least 50 questions, so there are at
    least 150. Each question has its own article. The same n and seed give the same bytes (with the
    same zlib); an article depends only on the seed, its split and its number. `cnn/README`
    describes the archive. A question takes about 3 kB of memory and 0.7 ms.

    Raises:
        DataError: its folder is only read, see `check_may_write`.
        OutputError: it cannot be written.
    """
    check_may_write(path)
    try:
        with staging(path) as folder:
            with open(folder / path.name, "wb") as file:
                _write(file, n, seed)
            publish(folder / path.name, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space, or set data_dir to "
            "a folder that can be written"
        ) from error


def ensure(path: Path, n: int, seed: int = 0) -> None:
    """Call `generate`, unless `path` is an archive of this version with these arguments.

    Raises:
        DataError: there is another file at `path`, which is not changed, or see `generate`.
        OutputError: it cannot be written.
    """
    clean(path.parent, path.name)
    if not os.path.lexists(path):
        log.info("generating %s", printable(path))
        generate(path, n, seed)
        return
    advice = "move it away: generated questions are kept there"
    _, found = next(read_archive(path, lambda _: True, 1 << 10, advice), ("", None))
    if found == _readme(n, seed):
        return
    if found is None or not found.startswith(MARK):
        raise DataError(f"{path} is not an archive of generated questions; {advice}")
    log.info("generating %s again: its settings or version differ", printable(path))
    generate(path, n, seed)


def article(split: str, number: int, seed: int = 0) -> Question:
    """Generate one example, a function of the arguments alone."""
    generator = random.Random(f"{VERSION} {seed} {split} {number}")
    while True:
        question = _article(generator, f"http://synthetic.invalid/{split}/{number}")
        if len(question.passage) <= MAX_TOKENS:
            return question


def _article(generator: random.Random, url: str) -> Question:
    language = grammar()
    length = generator.randint(110, 650)  # tokens; the last sentence may exceed it
    number = generator.randint(5, max(5, min(30, length // 18)))
    names = [f"@entity{k}" for k in generator.sample(range(ENTITIES), number)]
    kinds = _kinds(generator, names)
    facts = _facts(generator, kinds, max(2, min(number, length // 30)))
    # Use each role once, so that "the senator from …" is one person.
    roles: list[str] = generator.sample(language.roles, len(language.roles))
    units = [_fact_unit(generator, fact, kinds, names, roles) for fact in facts]
    asked = generator.choice([s for unit in units for s in unit if s.fact is not None])
    mentioned = {word for unit in units for s in unit for word in s.words}
    # Mention a few entities often, regardless of the facts about them.
    focus = generator.sample(names, generator.randint(1, 3))
    missing = [name for name in names if name not in mentioned]
    units += [[_Sentence(_filled(generator, language.mentioning, names, name))] for name in missing]
    total = sum(len(s.words) for unit in units for s in unit)
    while total < length:
        if generator.random() < 0.35:
            name = generator.choice(focus if generator.random() < 0.5 else names)
            words = _filled(generator, language.mentioning, names, name)
        else:
            words = _filled(generator, language.filling, names)
        total += len(words)
        units.append([_Sentence(words)])
    generator.shuffle(units)
    passage = [word for unit in units for s in unit for word in s.words]
    if generator.random() < 0.5:
        passage = ["(", generator.choice(names), ")", "--", *passage]
    question, answer = _question(generator, asked)
    surfaces = {
        word: f"{kinds[word]} {word.removeprefix('@entity')}"
        for word in passage
        if ENTITY.fullmatch(word)
    }
    return Question(url, passage, question, answer, surfaces)


def _kinds(generator: random.Random, names: list[str]) -> dict[str, str]:
    # With two persons and two places at least, two facts of one relation are possible.
    kinds = [PERSON, PERSON, PLACE, PLACE, PERSON]
    rest = (PERSON, PERSON, PERSON, PLACE, PLACE, COMPANY, COMPANY, TEAM, TEAM)
    kinds += [generator.choice(rest) for _ in names[len(kinds) :]]
    return dict(zip(names, kinds, strict=True))


def _facts(generator: random.Random, kinds: dict[str, str], wanted: int) -> list[_Fact]:
    """Draw facts for some of the relations, at least two for each.

    Within a relation an entity is the subject of at most one fact and the object of at most one, so
    every question has exactly one answer.
    """
    relations = grammar().relations
    facts: list[_Fact] = []
    for relation in generator.sample(relations, len(relations)):
        subjects = [name for name, kind in kinds.items() if kind == relation.subject]
        objects = [name for name, kind in kinds.items() if kind == relation.object]
        generator.shuffle(subjects)
        generator.shuffle(objects)
        pairs = [(s, o) for s, o in zip(subjects, objects, strict=False) if s != o]
        pairs = pairs[: generator.randint(2, 5)]
        if len(pairs) < 2:
            continue
        facts += [_Fact(relation, s, o) for s, o in pairs]
        if len(facts) >= wanted:
            break
    return facts


def _fact_unit(
    generator: random.Random,
    fact: _Fact,
    kinds: dict[str, str],
    names: list[str],
    roles: list[str],
) -> list[_Sentence]:
    """Return the sentences that state a fact; in some, only the first sentence names the subject.

    roles: those not yet used; a role used here is removed.
    """
    language = grammar()
    before: list[_Sentence] = []
    subject, wordings = fact.subject, fact.relation.wordings
    if fact.relation.subject == PERSON and (chance := generator.random()) < 0.3:
        if chance < 0.15 and roles:
            places = [name for name, kind in kinds.items() if kind == PLACE]
            role = f"the {roles.pop()} from {generator.choice(places)}"
            before.append(_Sentence(f"{subject} is {role} .".split()))
            between = generator.randint(0, 2)
            before += [
                _Sentence(_filled(generator, language.filling, names)) for _ in range(between)
            ]
            subject = role
        else:
            words = _filled(generator, language.bearing, names, subject)
            before.append(_Sentence(words))
            subject = generator.choice(("he", "she"))
            wordings = tuple(w for w in wordings if w.startswith("{s} "))
    wording = generator.choice(wordings)
    words = wording.format(s=subject, o=fact.object)
    if generator.random() < 0.3:
        words = f"{generator.choice(language.saying)} {words}"
    if generator.random() < 0.5:
        words = f"{words} {generator.choice(language.when)}"
    sentence = _Sentence(_slots(generator, words + " .", names), fact, wording)
    return [*before, sentence]


def _question(generator: random.Random, asked: _Sentence) -> tuple[list[str], str]:
    fact = asked.fact
    assert fact is not None
    wording = generator.choice([w for w in fact.relation.wordings if w != asked.wording])
    if generator.random() < 0.5:
        words, answer = wording.format(s=PLACEHOLDER, o=fact.object), fact.subject
    else:
        words, answer = wording.format(s=fact.subject, o=PLACEHOLDER), fact.object
    return words.split(" "), answer


def _filled(
    generator: random.Random, templates: tuple[str, ...], names: list[str], entity: str = ""
) -> list[str]:
    template = generator.choice(templates)
    if template[-1] not in ".?!":
        template += " ."
    return _slots(generator, template.replace("{e}", entity), names)


def _slots(generator: random.Random, template: str, names: list[str]) -> list[str]:
    """Fill every slot of a template with a random word."""
    language = grammar()
    lists = {
        "noun": language.nouns,
        "verb": language.verbs,
        "adjective": language.adjectives,
        "adverb": language.adverbs,
        "when": language.when,
        "other": names,
    }
    while "{" in template:
        start, end = template.index("{"), template.index("}")
        slot = template[start + 1 : end]
        if slot == "year":
            word = str(generator.randint(1950, 2015))
        elif slot == "number":
            # In 5 % of cases use a number that is likely to occur only once.
            rare = generator.random() < 0.05
            word = str(generator.randint(1000, 99_999) if rare else generator.randint(2, 99))
        else:
            word = generator.choice(lists[slot])
        template = template[:start] + word + template[end + 1 :]
    return template.split(" ")


def _write(file: IO[bytes], n: int, seed: int) -> None:
    held_out = max(LEAST, n // 20)
    sizes = (max(LEAST, n - 2 * held_out), held_out, held_out)
    with (
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        progress.bar(name="generating", total=sum(sizes)) as bar,
    ):
        _add(archive, "cnn/README", _readme(n, seed))
        for split, size in zip(SPLITS, sizes, strict=True):
            files = {}
            for number in range(size):
                content = format_question(article(split, number, seed)).encode()
                files[hashlib.sha1(content, usedforsecurity=False).hexdigest()] = content
                bar.update()
            # The order in which an unpacked folder would be read.
            for name, content in sorted(files.items()):
                _add(archive, f"cnn/questions/{split}/{name}.question", content)


def _readme(n: int, seed: int) -> bytes:
    return MARK + f"version {VERSION}, {n} questions, seed {seed}\n".encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without an owner, at time 0
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
