"""Generated questions in the layout of the CNN corpus, for tests and trials without the real one.

An article states facts, relation(subject, object), about entities whose numbers are drawn anew for
it, in one of several wordings each, among sentences that state nothing. The question states one of
them in another wording, with `@placeholder` for one of its entities. To answer it one has to find,
in the passage, the relation and the other entity: for every relation there are several facts, and
every entity takes part in several sentences. Some subjects are named only through another sentence
("@entity3 is the senator from @entity7 . … the senator from @entity7 visited @entity9 .", or a
pronoun after a sentence about its bearer).
"""

import gzip
import hashlib
import io
import logging
import os
import random
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from bnrnn.datasets.questions import ENTITY, PLACEHOLDER, SPLITS, Question, format_question
from bnrnn.errors import DataError, OutputError
from bnrnn.files import write_atomic

if TYPE_CHECKING:
    from bnrnn.datasets.cnn import QuestionCorpus

log = logging.getLogger(__name__)

MARK = b"Synthetic questions made by bnrnn: no real articles.\n"
VERSION = 1  # of the articles: raise it when they change
ENTITIES = 500
LEAST = 50  # questions a split
MAX_TOKENS = 700

# Entities of these kinds; a kind is nowhere written but follows from what is said of an entity.
PERSON, PLACE, COMPANY, TEAM = "person", "place", "company", "team"


class Relation(NamedTuple):
    subject: str
    object: str
    wordings: tuple[str, ...]  # {s} subject, {o} object; passage and question take different ones


RELATIONS = (
    Relation(PERSON, PLACE, (
        "{s} visited {o}", "{s} flew to {o}", "{s} made a trip to {o}", "{o} welcomed {s}",
        "officials in {o} received {s}", "{s} stopped in {o} during a tour",
    )),
    Relation(PERSON, PLACE, (
        "{s} was born in {o}", "{s} is a native of {o}", "{s} grew up in {o}",
        "{o} is the birthplace of {s}", "the family of {s} comes from {o}",
    )),
    Relation(PERSON, COMPANY, (
        "{s} leads {o}", "{s} is the head of {o}", "{o} is run by {s}", "{s} took charge of {o}",
        "{o} is under the control of {s}", "{s} serves as chief of {o}",
    )),
    Relation(PERSON, PERSON, (
        "{s} criticized {o}", "{s} attacked {o} in a speech", "{o} came under fire from {s}",
        "{s} had harsh words for {o}", "{o} was blamed by {s}", "{s} denounced {o}",
    )),
    Relation(PERSON, PERSON, (
        "{s} praised {o}", "{s} paid tribute to {o}", "{o} was honored by {s}",
        "{s} called {o} a hero", "{o} won warm applause from {s}",
    )),
    Relation(COMPANY, PERSON, (
        "{s} hired {o}", "{o} got a job at {s}", "{s} employs {o}", "{o} works for {s}",
        "{s} gave {o} a contract",
    )),
    Relation(PERSON, COMPANY, (
        "{s} sued {o}", "{s} filed a lawsuit against {o}", "{o} faces {s} in court",
        "{s} took legal action against {o}", "{o} was accused of fraud by {s}",
    )),
    Relation(COMPANY, COMPANY, (
        "{s} bought {o}", "{s} acquired {o}", "{o} was sold to {s}", "{s} took over {o}",
        "{o} now belongs to {s}", "{s} paid millions for {o}",
    )),
    Relation(COMPANY, PLACE, (
        "{s} is based in {o}", "{s} has its headquarters in {o}", "{o} is home to {s}",
        "the main office of {s} is in {o}", "{s} operates from {o}",
    )),
    Relation(TEAM, TEAM, (
        "{s} beat {o}", "{s} defeated {o}", "{o} lost to {s}", "{s} won against {o}",
        "{o} suffered a defeat against {s}", "{s} knocked out {o}",
    )),
    Relation(PERSON, TEAM, (
        "{s} joined {o}", "{o} signed {s}", "{s} plays for {o}", "{s} moved to {o} on loan",
        "{o} added {s} to the squad",
    )),
    Relation(PLACE, TEAM, (
        "{s} hosted {o}", "{o} played in {s}", "fans in {s} watched {o}",
        "{o} appeared in the stadium of {s}",
    )),
)  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ROLES = (
    "senator", "governor", "mayor", "actor", "singer", "judge", "doctor", "lawyer", "professor",
    "general", "bishop", "author", "pilot", "banker", "farmer", "journalist",
)  # fmt: skip
WHEN = (
    "on monday", "on tuesday", "on wednesday", "on thursday", "on friday", "last week",
    "last month", "earlier this year", "two years ago", "in january", "in march", "in june",
    "in october", "in december", "at the weekend", "in {year}", "in {year}",
)  # fmt: skip
SAYING = (
    "officials said", "sources say", "witnesses reported that", "it emerged that",
    "the newspaper wrote that", "according to reports ,", "it is known that", "despite protests ,",
)  # fmt: skip
# Said before a sentence that goes on with "he" or "she".
BEARING = (
    "{e} rarely talks to the press", "little was heard of {e} for a while",
    "the name of {e} is known to many", "cameras followed {e} all day", "{e} looked tired",
)  # fmt: skip
MENTIONING = (
    "a spokesman for {e} declined to comment", "analysts have long studied {e}",
    "readers sent {number} letters about {e}", "there was no word from {e}",
    "the {adjective} {noun} has nothing to do with {e}", "{e} remained in the {noun}",
    "many {noun}s mentioned {e} {adverb}", "a {noun} about {e} was {verb} {when}",
    "neither {e} nor {other} could explain the {noun}", "experts compared {e} with {other}",
)  # fmt: skip
FILLING = (
    "the {adjective} {noun} was {adverb} {verb} by a {noun}",
    "a {noun} {verb} the {noun} near the {adjective} {noun}",
    "{number} {noun}s were {verb} {when} , and the {noun} was {adjective}",
    "it was a {adjective} {noun} , but no {noun} was {verb}",
    "\" we {verb} the {noun} {adverb} , \" a {noun} said {when}",
    "the {noun} and the {noun} seemed {adjective} , even {adjective}",
    "what will become of the {adjective} {noun} ?",
    "some {noun}s {adverb} {verb} every {noun} in the {noun} with a {noun}",
    "nobody {verb} the {noun} , which had been {adjective} since {year}",
    "after the {noun} , {number} {noun}s {verb} their {adjective} {noun} {adverb}",
)  # fmt: skip
NOUNS = _words(
    """
    account agency airport album animal apartment army article artist bank battle beach bill
    boat book border bottle bridge budget building bus camera campaign capital card career cat
    ceremony chair channel chapter church circle cloud coach coast coffee college color column
    committee computer concert conference corner cotton cousin crowd culture customer dance deal
    debate decade degree demand desert design desk detail device dinner dream dress driver drug
    election email engine event exam factory farm festival field film fire flag flight flood
    flower forest game garden gate gift guest guitar hall harbor hat hospital hotel house idea
    image industry island jacket journal journey kitchen ladder lake lamp language law leader
    lesson library machine magazine map market match meal medal meeting message mirror model
    moment monument morning motor mountain museum neighbor network novel ocean offer opera
    orchestra order painting palace paper park partner path pattern payment pencil phone photo
    piano picture planet plate poem poet pool port poster prize problem product program project
    protest question radio rain record region report restaurant result ring river road rocket
    roof room sample scandal school season secret sector sentence shadow ship shirt shop signal
    sister sketch soldier song speaker station statue storm street student summer symbol table
    temple theater theory ticket tower trader train tree trial truck tunnel umbrella uncle
    valley vehicle video village visitor voter wall wedding window winter worker writer
    """
)
VERBS = _words(
    """
    abandoned accepted admired adopted announced approved arranged asked avoided awarded banned
    blocked borrowed broadcast broken built canceled carried caught celebrated changed chosen
    cleaned closed collected completed copied counted covered crossed damaged decorated delayed
    delivered described designed destroyed discovered discussed doubled driven earned examined
    expected explored filled filmed fixed forgotten found guarded helped hidden ignored improved
    inspected introduced invited kept launched lifted loaded lost measured missed noticed opened
    ordered owned painted planned postponed prepared printed promised protected published pulled
    pushed raised recorded reduced refused remembered repaired replaced requested rescued
    returned sealed searched shaped shown stolen stopped studied supplied tested thrown touched
    trusted used wanted washed
    """
)
ADJECTIVES = _words(
    """
    ancient angry bitter blue brave brief bright broad busy calm careful cheap clean clear
    clever cold common complex cool crowded curious dark deep delicate dirty dry dull eager
    early empty expensive famous fast final firm foreign formal fragile free fresh friendly
    gentle golden grand green heavy hidden hollow huge humble idle initial invisible large late
    lazy local lonely loud lucky massive mild modern modest narrow nervous noisy odd old orange
    ordinary pale patient plain polite popular proud quick quiet rapid rare recent remote rich
    rough round rural sad safe secure sharp short silent simple slow small smooth soft solid
    strange strict strong sudden sweet tall thick thin tiny tough ugly unusual urban urgent
    usual vast warm weak wet wide wild wooden young
    """
)
ADVERBS = _words(
    """
    again almost barely briefly carefully clearly completely easily eventually exactly finally
    frequently fully gladly hardly honestly largely lately mostly nearly obviously often openly
    partly perhaps privately probably publicly quickly quietly rapidly really recently regularly
    secretly seldom slowly somehow soon suddenly twice usually widely
    """
)


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

    5 % each for validation and test, but no split has fewer than 50 (so 150 is the least there
    is); a question of each article. The same n and seed give the same bytes (with the same zlib),
    and an article depends on seed, split and its number only. `cnn/README` says what it is.
    Takes some 3 kB of memory and 0.7 ms a question.

    Raises:
        OutputError: it cannot be written.
    """
    held_out = max(LEAST, n // 20)
    sizes = (max(LEAST, n - 2 * held_out), held_out, held_out)
    buffer = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", 6, buffer, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        tqdm(total=sum(sizes), desc="generating", disable=None, dynamic_ncols=True) as bar,
    ):
        _add(archive, "cnn/README", _readme(n, seed))
        for split, size in zip(SPLITS, sizes, strict=True):
            files = {}
            for number in range(size):
                content = format_question(article(split, number, seed)).encode()
                files[hashlib.sha1(content, usedforsecurity=False).hexdigest()] = content
                bar.update()
            # In the order in which the unpacked folder is read.
            for name, content in sorted(files.items()):
                _add(archive, f"cnn/questions/{split}/{name}.question", content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except (OSError, OutputError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        raise OutputError(
            f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}; free some space, "
            "or set data_dir to a folder that can be written"
        ) from error


def ensure(path: Path, n: int, seed: int = 0) -> None:
    """`generate`, unless `path` is an archive of this version with these arguments.

    Raises:
        DataError: there is another file at `path`, which is left alone.
        OutputError: it cannot be written.
    """
    if not os.path.exists(path):
        log.info("generating %s", path)
        generate(path, n, seed)
        return
    found = _first_member(path)
    if found == _readme(n, seed):
        return
    if not found.startswith(MARK):
        raise DataError(f"{path} is not an archive of generated questions; move it away")
    log.info("generating %s anew: it is of other settings or another version", path)
    generate(path, n, seed)


def article(split: str, number: int, seed: int = 0) -> Question:
    """One example; the same for the same arguments."""
    generator = random.Random(f"{VERSION} {seed} {split} {number}")
    while True:
        question = _article(generator, f"http://synthetic.invalid/{split}/{number}")
        if len(question.passage) <= MAX_TOKENS:
            return question


def baselines(corpus: "QuestionCorpus", part: str = "valid") -> dict[str, float]:
    """Accuracies, in [0, 1], of guesses that do not put question and passage together.

    "frequent": the entity that is most frequent in the passage. "frequent_other": the same among
    those that the question does not name. "question": the likeliest answer given the words of the
    question without entities, by naive Bayes with add-one smoothing, learnt on the training split.
    "random": a random entity of the passage. "beside": the one most often in a sentence with an
    entity of the question, itself excepted. Ties: the first in the passage.
    """
    split = getattr(corpus, part)
    is_entity = np.zeros(len(corpus.words), bool)
    is_entity[corpus.entity_ids] = True
    ends = {k for k, word in enumerate(corpus.words) if word in (".", "?", "!")}
    guess = _naive_bayes(corpus, is_entity)
    right = Counter[str]()
    for row in range(len(split)):
        passage, question = split.passages[row], split.questions[row]
        answer = int(split.answers[row])
        named = set(question[is_entity[question]].tolist())
        entities = Counter(passage[is_entity[passage]].tolist())
        others = Counter({entity: n for entity, n in entities.items() if entity not in named})
        beside = Counter[int]()
        sentence: list[int] = []
        for word in passage.tolist():
            if is_entity[word]:
                sentence.append(word)
            elif word in ends:
                if named & set(sentence):
                    beside.update(set(sentence) - named)
                sentence = []
        # most_common() keeps the order of equals, which is that of the passage.
        right["frequent"] += bool(entities) and entities.most_common(1)[0][0] == answer
        right["frequent_other"] += bool(others) and others.most_common(1)[0][0] == answer
        right["beside"] += bool(beside) and beside.most_common(1)[0][0] == answer
        right["question"] += guess(question) == answer
        # The expectation; counted in billionths to stay with whole numbers.
        right["random"] += round(1e9 / len(entities)) if answer in entities else 0
    accuracies = {name: count / len(split) for name, count in right.items()}
    return accuracies | {"random": accuracies["random"] / 1e9}


def _naive_bayes(corpus: "QuestionCorpus", is_entity: np.ndarray) -> Callable[[np.ndarray], int]:
    places = {int(entity): place for place, entity in enumerate(corpus.entity_ids)}
    prior = np.ones(len(places))
    # (words, entities): how often the word is in a question with that answer.
    counts = np.ones((len(corpus.words), len(places)), np.float32)
    for row in range(len(corpus.train)):
        place = places.get(int(corpus.train.answers[row]))
        if place is not None:
            question = corpus.train.questions[row]
            prior[place] += 1
            np.add.at(counts[:, place], question[~is_entity[question]], 1)
    # In place: for the whole corpus this is the largest array by far.
    counts /= counts.sum(axis=0)
    np.log(counts, out=counts)

    def guess(question: np.ndarray) -> int:
        scores = np.log(prior) + counts[question[~is_entity[question]]].sum(axis=0)
        return int(corpus.entity_ids[scores.argmax()])

    return guess


def _article(generator: random.Random, url: str) -> Question:
    length = generator.randint(110, 650)  # tokens; the last sentence may exceed it
    number = generator.randint(5, max(5, min(30, length // 18)))
    names = [f"@entity{k}" for k in generator.sample(range(ENTITIES), number)]
    kinds = _kinds(generator, names)
    facts = _facts(generator, kinds, max(2, min(number, length // 30)))
    # Each role once, so that "the senator from …" is one person.
    roles: list[str] = generator.sample(ROLES, len(ROLES))
    units = [_fact_unit(generator, fact, kinds, names, roles) for fact in facts]
    asked = generator.choice([s for unit in units for s in unit if s.fact is not None])
    mentioned = {word for unit in units for s in unit for word in s.words}
    # A few are spoken of often, whatever the facts say of them.
    focus = generator.sample(names, generator.randint(1, 3))
    missing = [name for name in names if name not in mentioned]
    units += [[_Sentence(_filled(generator, MENTIONING, names, name))] for name in missing]
    total = sum(len(s.words) for unit in units for s in unit)
    while total < length:
        if generator.random() < 0.35:
            name = generator.choice(focus if generator.random() < 0.5 else names)
            words = _filled(generator, MENTIONING, names, name)
        else:
            words = _filled(generator, FILLING, names)
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
    # Two persons and two places at least, so that two facts of a relation can be stated.
    kinds = [PERSON, PERSON, PLACE, PLACE, PERSON]
    rest = (PERSON, PERSON, PERSON, PLACE, PLACE, COMPANY, COMPANY, TEAM, TEAM)
    kinds += [generator.choice(rest) for _ in names[len(kinds) :]]
    return dict(zip(names, kinds, strict=True))


def _facts(generator: random.Random, kinds: dict[str, str], wanted: int) -> list[_Fact]:
    """Facts of some relations, at least two of each.

    Of one relation every entity is the subject of one fact at most, and the object of one: a
    question has one answer.
    """
    facts: list[_Fact] = []
    for relation in generator.sample(RELATIONS, len(RELATIONS)):
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
    """The sentences that state a fact; in some the subject is named by the first one only.

    roles: those not taken yet; one that is used is removed.
    """
    before: list[_Sentence] = []
    subject, wordings = fact.subject, fact.relation.wordings
    if fact.relation.subject == PERSON and (chance := generator.random()) < 0.3:
        if chance < 0.15 and roles:
            places = [name for name, kind in kinds.items() if kind == PLACE]
            role = f"the {roles.pop()} from {generator.choice(places)}"
            before.append(_Sentence(f"{subject} is {role} .".split()))
            between = generator.randint(0, 2)
            before += [_Sentence(_filled(generator, FILLING, names)) for _ in range(between)]
            subject = role
        else:
            words = _filled(generator, BEARING, names, subject)
            before.append(_Sentence(words))
            subject = generator.choice(("he", "she"))
            wordings = tuple(w for w in wordings if w.startswith("{s} "))
    wording = generator.choice(wordings)
    words = wording.format(s=subject, o=fact.object)
    if generator.random() < 0.3:
        words = f"{generator.choice(SAYING)} {words}"
    if generator.random() < 0.5:
        words = f"{words} {generator.choice(WHEN)}"
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
    """Words for the slots of a template, each slot drawn by itself."""
    while "{" in template:
        start, end = template.index("{"), template.index("}")
        match template[start + 1 : end]:
            case "noun":
                word = generator.choice(NOUNS)
            case "verb":
                word = generator.choice(VERBS)
            case "adjective":
                word = generator.choice(ADJECTIVES)
            case "adverb":
                word = generator.choice(ADVERBS)
            case "when":
                word = generator.choice(WHEN)
            case "year":
                word = str(generator.randint(1950, 2015))
            case "number":
                # Now and then one that is hardly seen twice.
                rare = generator.random() < 0.05
                word = str(generator.randint(1000, 99_999) if rare else generator.randint(2, 99))
            case "other":
                word = generator.choice(names)
            case slot:
                raise AssertionError(slot)
        template = template[:start] + word + template[end + 1 :]
    return template.split(" ")


def _readme(n: int, seed: int) -> bytes:
    return MARK + f"version {VERSION}, {n} questions, seed {seed}\n".encode()


def _first_member(path: Path) -> bytes:
    """Its content; empty if the file is no such archive."""
    try:
        with tarfile.open(path, "r|gz") as archive:
            member = archive.next()
            file = archive.extractfile(member) if member and member.isreg() else None
            return file.read(1 << 10) if file else b""
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return b""


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner, time 0
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
