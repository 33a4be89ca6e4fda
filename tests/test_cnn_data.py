"""CNN questions: file format, vocabulary, cache, generator and batches."""

import gzip
import hashlib
import io
import logging
import os
import shutil
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bnrnn.datasets import (
    Question,
    QuestionCorpus,
    bucketed_batches,
    load_cnn,
    pad,
    relabel_entities,
    select_sentences,
)
from bnrnn.datasets.cache import cached_folder
from bnrnn.datasets.cnn import corpus as corpus_module
from bnrnn.datasets.cnn import load, questions, select, synthetic
from bnrnn.datasets.cnn.corpus import EOS, NIL, NUM, SPECIALS, UNK
from bnrnn.datasets.cnn.questions import (
    format_question,
    parse_question,
    stream_questions,
)
from bnrnn.errors import DataError, OutputError
from tests.conftest import DATA, QUESTIONS, missing_data
from tests.question_corpora import baselines, four_sentence_items, question_corpus

SIZE = 1000


def real(name: str) -> Path:
    if reason := missing_data(QUESTIONS):
        pytest.skip(reason)
    return DATA / "cnn_qa" / name


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data_dir with an archive of SIZE generated questions."""
    folder = tmp_path_factory.mktemp("generated")
    synthetic.generate(folder / "cnn_synthetic" / f"cnn-synthetic-{SIZE}.tgz", SIZE)
    return folder


@pytest.fixture(scope="module")
def corpus(generated: Path) -> Iterator[QuestionCorpus]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNRNN_CACHE_DIR", str(generated / "cache"))
        yield load_cnn(generated, synthetic=SIZE)


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def words(text: str) -> list[str]:
    return text.split(" ")


def ask(passage: str, question: str = "who is @placeholder", answer: str = "@entity1") -> Question:
    return Question("http://x", words(passage), words(question), answer, {})


SMALL = {
    "training": [
        ask("@entity1 met @entity2 . they met 12 12 times in unseen"),
        ask("@entity1 saw @entity3 in 7 places", "@placeholder saw 12 places", "@entity3"),
    ],
    "validation": [ask("@entity1 met @entity9 and 99", "who met @placeholder", "@entity9")],
    "test": [ask("@entity2 met them in a place", "who is @placeholder", "@entity2")],
}


def write_folder(root: Path, splits: dict[str, list[Question]] = SMALL) -> Path:
    for split, found in splits.items():
        folder = root / "questions" / split
        folder.mkdir(parents=True)
        for number, question in enumerate(found):
            (folder / f"{number}.question").write_text(format_question(question))
    return root


def write_archive(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def small_members() -> dict[str, bytes | tarfile.TarInfo]:
    return {
        f"cnn/questions/{split}/{number}.question": format_question(question).encode()
        for split, found in SMALL.items()
        for number, question in enumerate(found)
    }


def arrays(corpus: QuestionCorpus) -> list:
    parts = [corpus.train, corpus.valid, corpus.test]
    rows = [list(kind) for part in parts for kind in (part.passages, part.questions)]
    return [
        corpus.words,
        corpus.entity_ids.tolist(),
        [[row.tolist() for row in kind] for kind in rows],
        [part.answers.tolist() for part in parts],
    ]


# --- the format -----------------------------------------------------------------------------------


def test_genuine_questions_are_read_and_written_back_byte_for_byte():
    paths = sorted(real("questions").glob("*.question"))
    assert len(paths) == 3
    found = [parse_question(path.read_bytes(), path.name) for path in paths]
    for path, question in zip(paths, found, strict=True):
        assert format_question(question).encode() == path.read_bytes()
    assert [question.answer for question in found] == ["@entity1", "@entity0", "@entity9"]
    assert found[0].question == [
        "@entity192",
        "produces",
        "30",
        "guidebooks",
        "on",
        "@placeholder",
        "travel",
    ]
    assert found[0].passage[:6] == ["(", "@entity0", ")", "--", "each", "summer"]
    assert found[0].url.startswith("http://web.archive.org/web/2015")
    assert all(question.entities == {} for question in found)


def test_all_fields_survive():
    question = Question(
        "", ["a\x85b", "@entity1", "."], ["\x85", "@placeholder", "\u2028"], "@entity1",
        {"@entity1": "A: B", "@entity22": ""},
    )  # fmt: skip
    text = format_question(question)
    assert text == "\n\na\x85b @entity1 .\n\n\x85 @placeholder \u2028\n\n@entity1\n\n" + (
        "@entity1:A: B\n@entity22:"
    )
    assert parse_question(text, "x") == question
    assert parse_question(text.encode(), "x") == question
    # Line endings of another system, and a final newline from an editor.
    assert parse_question(text.replace("\n", "\r\n").encode() + b"\r\n", "x") == question
    short = format_question(question._replace(entities={})).rstrip("\n")
    assert parse_question(short, "x") == question._replace(entities={})


GOOD = format_question(SMALL["training"][0])
MALFORMED = [
    (GOOD.replace("@placeholder", "it"), "0 times @placeholder"),
    (GOOD.replace("who", "@placeholder"), "2 times @placeholder"),
    (GOOD.replace("\n\n@entity1\n\n", "\n\nentity1\n\n"), "answer 'entity1'"),
    (GOOD.replace("\n\n@entity1\n\n", "\n\n@entity1 x\n\n"), "'@entity1 x'"),
    (GOOD.replace("\n\n@entity1\n\n", "\n\n\n\n"), "answer ''"),
    (
        GOOD.replace("\n\n@entity1\n\n", "\n\n@entity3\n\n"),
        "answer @entity3",
    ),
    (format_question(ask("x")._replace(passage=[])), "empty passage"),
    (format_question(ask("@entity1")._replace(question=[])), "empty question"),
    ("", "1 fields"),
    (GOOD + "\n\n@entity2:b", "6 fields"),
    (GOOD.replace("met @entity2", "met\n@entity2"), "several lines"),
    (GOOD + "@entity1 Bob", "'@entity1 Bob'"),
    (GOOD + "@entity1:a\n@entity1:b", "@entity1 twice"),
    (GOOD + "entity1:Bob", "'entity1:Bob'"),
    (GOOD.encode().replace(b"met", b"m\xe9t"), "byte 20"),
]


@pytest.mark.parametrize(("content", "detail"), MALFORMED)
def test_a_malformed_question_is_refused_by_name(content: str | bytes, detail: str):
    message = error_of(parse_question, content, "some/file.question")
    assert message.startswith("some/file.question ")
    assert detail in message


def test_the_answer_may_be_gone_after_a_selection():
    text = GOOD.replace("\n\n@entity1\n\n", "\n\n@entity3\n\n")
    assert parse_question(text, "x", answer_in_passage=False).answer == "@entity3"


@pytest.mark.parametrize("packed", [False, True])
def test_malformed_files_are_named(packed: bool, tmp_path: Path):
    contents = [c.encode() if isinstance(c, str) else c for c, _ in MALFORMED]
    contents += [b"x" * (questions.MAX_BYTES + 1), GOOD.encode()]
    members = {f"cnn/questions/training/{k:02}.question": c for k, c in enumerate(contents)}
    source = write_archive(tmp_path / "cnn.tgz", {**members})
    if not packed:
        source = tmp_path / "folder"
        with tarfile.open(tmp_path / "cnn.tgz") as archive:
            archive.extractall(source, filter="data")
    message = error_of(list, stream_questions(source))
    assert message.startswith(str(source))
    assert "cnn/questions/training/00.question" in message


def test_a_folder_is_read_in_the_order_of_names_and_an_archive_in_its_own(tmp_path: Path):
    names = ["b", "a", "c"]
    files = {name: ask(f"{name} @entity1") for name in names}
    other = {
        "cnn/questions/validation/z.question": GOOD.encode(),
        "cnn/questions/training/notes.txt": b"?",
        "cnn/questions/training/._a.question": b"\xff",
        "cnn/training/a.question": b"?",
        "./cnn/questions/training/d.question": format_question(ask("d @entity1")).encode(),
    }
    path = write_archive(
        tmp_path / "cnn.tgz",
        {f"cnn/questions/training/{n}.question": format_question(files[n]).encode() for n in files}
        | other,
    )

    def first_words(source: Path, split: str) -> list[str]:
        return [asked.passage[0] for found, asked in stream_questions(source) if found == split]

    assert first_words(path, "training") == ["b", "a", "c", "d"]
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    for source in (tmp_path, tmp_path / "cnn"):
        assert first_words(source, "training") == ["a", "b", "c", "d"]
        assert first_words(source, "validation") == ["@entity1"]
        assert first_words(source, "test") == []


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("/cnn/questions/training/a.question", b"", "is outside"),
        ("cnn/questions/training/../../../a.question", b"", "is outside"),
        ("../x", b"", "is outside"),
        ("cnn/a", link("cnn/a", tarfile.SYMTYPE), "is a link"),
        ("cnn/questions/test/a.question", link("cnn/b", tarfile.LNKTYPE), "is a link"),
    ],
)
def test_a_hostile_archive_is_refused(name: str, content, what: str, tmp_path: Path):
    path = write_archive(tmp_path / "cnn.tgz", {**small_members(), name: content})
    shown = content.name if isinstance(content, tarfile.TarInfo) else name
    message = error_of(list, stream_questions(path))
    assert f"{path} is refused: its member {shown!r} {what}" in message


def test_an_archive_that_is_cut_off_or_damaged_anywhere_is_refused(tmp_path: Path):
    whole = write_archive(tmp_path / "cnn.tgz", small_members()).read_bytes()
    path = tmp_path / "cut.tgz"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        message = error_of(list, stream_questions(path))
        assert f"{path} cannot be read or unpacked" in message
    # A wrong checksum: the content differs from the original.
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    assert "cannot be read" in error_of(list, stream_questions(path))
    # A destroyed header in an otherwise valid file: tarfile treats it as the end.
    plain = bytearray(gzip.decompress(whole))
    plain[1024:1100] = b"?" * 76
    path.write_bytes(gzip.compress(bytes(plain) + b"\0" * 20_000 + b"rest"))
    assert "cannot be read" in error_of(list, stream_questions(path))
    assert "No such file" in error_of(list, stream_questions(tmp_path / "none.tgz"))
    assert "no questions/training" in error_of(list, stream_questions(tmp_path))


# --- vocabulary and corpus ------------------------------------------------------------------------


def test_vocabulary():
    found = question_corpus("small", *SMALL.values())
    assert (NIL, EOS, UNK, NUM) == (0, 1, 2, 3)
    assert found.words[:4] == SPECIALS
    # Most frequent first, ties in alphabetical order; words that occur once are left out, except
    # entities.
    counted = [
        ("12", 3), ("@entity1", 3), ("@entity3", 2), ("@placeholder", 2), ("in", 2), ("met", 2),
        ("places", 2), ("saw", 2), ("@entity2", 1),
    ]  # fmt: skip
    assert found.words[4:] == tuple(word for word, _ in counted)
    ids = {word: k for k, word in enumerate(found.words)}
    assert found.entity_ids.tolist() == sorted(ids[f"@entity{k}"] for k in (1, 2, 3))
    assert found.entity_ids.dtype == np.int64
    number, twelve = UNK, ids["12"]
    assert found.train.passages[1].tolist() == [
        ids["@entity1"], ids["saw"], ids["@entity3"], ids["in"], number, ids["places"],
    ]  # fmt: skip
    assert found.train.questions[1].tolist() == [
        ids["@placeholder"], ids["saw"], twelve, ids["places"],
    ]  # fmt: skip
    assert found.train.answers.tolist() == [ids["@entity1"], ids["@entity3"]]
    assert found.train.answers.dtype == np.int64
    # An entity that does not occur in training is unknown, like a word.
    assert found.valid.passages[0].tolist() == [ids["@entity1"], ids["met"], UNK, UNK, number]
    assert found.valid.answers.tolist() == [UNK]
    assert [found.facts[part]["unknown_answers"] for part in ("train", "valid", "test")] == [
        0, 1, 0,
    ]  # fmt: skip
    assert found.decode(found.test.passages[0][:3]) == ["@entity2", "met", "<unk>"]


def test_a_word_of_the_text_never_gets_a_special_id():
    odd = [ask("<nil> @entity1 <nil> <num>")]
    found = question_corpus("odd", odd, odd, odd)
    assert found.train.passages[0].tolist() == [UNK, 4, UNK, UNK]


def test_rows(corpus: QuestionCorpus):
    rows = corpus.train.passages
    assert isinstance(rows.flat, np.memmap)
    assert rows.flat.dtype == np.int32
    assert rows.offsets.dtype == np.int64
    assert len(rows) == len(corpus.train) == len(corpus.train.questions) == 900
    assert len(list(rows)) == 900
    np.testing.assert_array_equal(rows[-1], rows[899])
    np.testing.assert_array_equal(rows.lengths, [len(row) for row in rows])
    assert np.shares_memory(rows[3], rows.flat)
    for index in (900, -901):
        with pytest.raises(IndexError):
            rows[index]


def test_folder_and_archive_give_the_same_corpus(
    tmp_path: Path, generated: Path, corpus: QuestionCorpus, caplog: pytest.LogCaptureFixture
):
    archive = generated / "cnn_synthetic" / f"cnn-synthetic-{SIZE}.tgz"
    packed = tmp_path / "packed" / "cnn_qa" / "cnn.tgz"
    packed.parent.mkdir(parents=True)
    shutil.copy(archive, packed)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "folder", filter="data")
    expected = arrays(corpus)
    for data_dir in ("packed", "folder"):
        found = load_cnn(tmp_path / data_dir)
        assert arrays(found) == expected
        assert (found.name, found.synthetic, found.whole) == ("CNN questions", False, False)
    assert corpus.synthetic
    assert corpus.whole
    assert corpus.name == "synthetic CNN-like questions (1,000)"
    warning = "holds 900 / 50 / 50 questions, not the 380,298 / 3,924 / 3,198 of the published"
    assert all(warning in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("place", ["cnn", "cnn_qa", "cnn_qa/cnn", "cnn/cnn"])
def test_places_of_the_folder(place: str, tmp_path: Path):
    write_folder(tmp_path / place)
    found = load_cnn(tmp_path)
    assert arrays(found) == arrays(question_corpus("", *SMALL.values()))


def test_missing_data_are_asked_for(tmp_path: Path):
    message = error_of(load_cnn, tmp_path)
    assert str(tmp_path / "cnn_qa" / "cnn.tgz") in message
    assert load.SHA256 in message
    assert f"id={load.DRIVE_ID}" in message
    readme = real("..") / "README.md"
    assert f"`{load.DRIVE_ID}`" in readme.read_text()
    assert f"sha256 {load.SHA256}" in readme.read_text()
    # The three genuine questions belong to no split.
    assert "not there" in error_of(load_cnn, DATA)


def test_a_split_without_questions_is_refused(tmp_path: Path, cache_dir: Path):
    write_folder(tmp_path / "cnn", SMALL | {"validation": []})
    assert "has no validation questions" in error_of(load_cnn, tmp_path)
    assert os.listdir(cache_dir) == []


@pytest.mark.parametrize("packed", [False, True])
def test_the_cache_is_used_until_the_source_changes(
    packed: bool, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    builds = []
    write_corpus = load.write_corpus
    monkeypatch.setattr(load, "write_corpus", lambda *args: (builds.append(1), write_corpus(*args)))

    def write(members) -> None:
        path = write_archive(tmp_path / "cnn_qa" / "cnn.tgz", members)
        if not packed:
            with tarfile.open(path) as archive:
                archive.extractall(tmp_path / "cnn", filter="data")
            path.unlink()

    write(small_members())
    first = load_cnn(tmp_path)
    second = load_cnn(tmp_path)
    assert len(builds) == 1
    assert arrays(first) == arrays(second)
    assert first.facts == second.facts
    write(small_members() | {"cnn/questions/training/9.question": GOOD.encode()})
    assert len(load_cnn(tmp_path).train) == 3
    assert len(builds) == 2
    # The same names with other content.
    write(small_members() | {"cnn/questions/training/9.question": GOOD.encode() + b"@entity1:x"})
    load_cnn(tmp_path)
    assert len(builds) == 3
    monkeypatch.setattr(load, "FORMAT_VERSION", load.FORMAT_VERSION + 1)
    load_cnn(tmp_path)
    assert len(builds) == 4
    # No incomplete file remains.
    assert all(not name.startswith(".") for name in os.listdir(cache_dir))
    assert not list(cache_dir.rglob("*.raw"))


@pytest.mark.parametrize("file", ["train-passages.npy", "words.txt", "test-answers.npy"])
def test_a_damaged_cache_is_built_afresh(file: str, tmp_path: Path, cache_dir: Path):
    write_folder(tmp_path / "cnn")
    expected = arrays(load_cnn(tmp_path))
    (folder,) = cache_dir.iterdir()
    if file == "words.txt":
        (folder / file).unlink()
    else:
        os.truncate(folder / file, os.path.getsize(folder / file) - 4)
    assert arrays(load_cnn(tmp_path)) == expected
    assert list(cache_dir.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "cnn")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match=r"cannot write the cache .*BNRNN_CACHE_DIR"):
        load_cnn(tmp_path)


def test_the_cache_is_in_the_users_cache_folder_without_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_folder(tmp_path / "cnn")
    monkeypatch.delenv("BNRNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    monkeypatch.setenv("HOME", str(tmp_path / "users"))
    load_cnn(tmp_path)
    assert len(list((tmp_path / "users").rglob("bnrnn/cnn-*"))) == 1


def test_a_source_that_changes_while_it_is_read_is_not_cached(tmp_path: Path, cache_dir: Path):
    source = tmp_path / "source"
    source.write_text("old")

    def build(folder: Path) -> None:
        (folder / "content").write_text(source.read_text())
        source.write_text("new")

    def load(folder: Path) -> str:
        return (folder / "content").read_text()

    assert "changed while" in error_of(cached_folder, "x", source.read_text, build, load)
    assert os.listdir(cache_dir) == []
    assert cached_folder("x", source.read_text, build, load) == "new"


def test_a_process_that_was_slower_takes_what_the_other_wrote(tmp_path: Path, cache_dir: Path):
    def load(folder: Path) -> str:
        return (folder / "content").read_text()

    def write(folder: Path, content: str) -> None:
        (folder / "content").write_text(content)

    def slow(folder: Path) -> None:
        assert cached_folder("x", lambda: "0", lambda f: write(f, "fast"), load) == "fast"
        write(folder, "slow")

    assert cached_folder("x", lambda: "0", slow, load) == "fast"
    assert len(os.listdir(cache_dir)) == 1


def test_memory_for_the_whole_corpus_is_bounded(
    tmp_path: Path, generated: Path, monkeypatch: pytest.MonkeyPatch
):
    # Small enough that memory does not depend on the size of these archives.
    monkeypatch.setattr(corpus_module, "CHUNK", 1 << 12)
    source = generated / "cnn_synthetic" / f"cnn-synthetic-{SIZE}.tgz"
    small = tmp_path / "cnn_synthetic" / "cnn-synthetic-150.tgz"
    synthetic.generate(small, 150)
    peaks = []
    for path in (small, source):
        folder = tmp_path / path.stem
        folder.mkdir()
        found = stream_questions(path)
        tracemalloc.start()
        corpus_module.write_corpus(folder, found, str(path), {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    growth = (peaks[1] - peaks[0]) / (SIZE - 150)
    whole = (peaks[0] + 387_420 * growth) / 1e9
    print(f"{growth:.0f} bytes a question, {whole:.2f} GB for the whole corpus")
    # A list of the ids would take 3,000 bytes per question, and the headers that tarfile keeps 500.
    assert growth < 100
    assert whole < 0.1


# --- four sentences -------------------------------------------------------------------------------


def test_selection_of_sentences():
    passage = (
        "the cat sat . the dog of @entity2 ran ! did @entity1 eat fish ? the end . "
        "@entity1 ate no fish with @entity2 and many other people on a boat . dog and cat"
    )
    chosen = select_sentences(
        passage.split(" "), ["@placeholder", "ate", "fish", "with", "a", "dog"], 3
    )
    # Shared words / √(content words): 0, 1/√3, 1/√3, 0, 2/√6, 1/√2; ties go to the earlier one.
    assert " ".join(chosen) == (
        "the dog of @entity2 ran ! "
        "@entity1 ate no fish with @entity2 and many other people on a boat . dog and cat"
    )
    # Stop words and punctuation do not count, so no sentence matches and the first ones are taken.
    chosen = select_sentences(
        ["x", ".", "the", "y", ".", "the", "z", "."], ["the", "@placeholder", "."], 2
    )
    assert chosen == ["x", ".", "the", "y", "."]
    # The placeholder matches nothing, and a short passage is returned whole.
    assert select_sentences(["a", "b"], ["b"], 4) == ["a", "b"]
    assert select_sentences(["x", ".", "@placeholder", "."], ["@placeholder"], 1) == ["x", "."]


def test_four_sentences_of_genuine_questions():
    for path in real("questions").glob("*.question"):
        question = parse_question(path.read_bytes(), path.name)
        chosen = select_sentences(question.passage, question.question)
        assert len(select.split_sentences(chosen)) == 4
        assert question.answer in chosen
        assert len(chosen) < len(question.passage) / 2
        sentences = select.split_sentences(question.passage)
        assert [word for sentence in sentences for word in sentence] == question.passage
        kept = [sentences.index(sentence) for sentence in select.split_sentences(chosen)]
        assert kept == sorted(kept)


def test_recall_is_the_share_that_kept_the_answer(generated: Path, corpus: QuestionCorpus):
    short = load_cnn(generated, synthetic=SIZE, four_sentences=True)
    for part in ("train", "valid", "test"):
        split, whole = getattr(short, part), getattr(corpus, part)
        kept = [answer in row for row, answer in zip(split.passages, split.answers, strict=True)]
        assert short.facts[part]["recall"] == pytest.approx(np.mean(kept))
        assert "recall" not in corpus.facts[part]
        assert len(split) == len(whole)
    assert 0.6 < short.facts["train"]["recall"] < 0.9
    assert "four sentences" in short.name
    assert "synthetic" in short.name
    expected = select_sentences(
        corpus.decode(corpus.valid.passages[5]), corpus.decode(corpus.valid.questions[5])
    )
    assert len(short.valid.passages[5]) == len(expected)


def test_four_sentence_items():
    items = four_sentence_items(real("four_sentence_sample.txt"))
    assert len(items) == 200
    assert len({item.answer for item in items}) == 61
    assert all(item.answer in item.passage for item in items)
    assert items[0].question == [
        "@entity192",
        "produces",
        "30",
        "guidebooks",
        "on",
        "@placeholder",
        "travel",
        "?",
    ]
    assert items[0].answer == "@entity1"
    assert items[1].passage[:4] == ["@entity0", "who", "lost", "the"]
    counts = [len({w for w in item.passage if questions.ENTITY.fullmatch(w)}) for item in items]
    assert (min(counts), max(counts)) == (2, 18)
    found = question_corpus("sample", items, items[:9], items[:9])
    assert len(found.train) == 200
    assert not (found.train.answers == UNK).any()


# --- generated questions --------------------------------------------------------------------------


def test_the_articles_are_those_of_this_version():
    """A change of the generator or of its grammar needs a new VERSION."""
    digest = hashlib.sha256()
    for split in questions.SPLITS:
        for seed in (0, 1):
            for number in range(200):
                digest.update(format_question(synthetic.article(split, number, seed)).encode())
    assert (synthetic.VERSION, digest.hexdigest()) == (
        1, "36cb33f09b184e8f84668404f3d9b945887225d56347d983598774c7119b9dc0",
    )  # fmt: skip


def test_generation_is_deterministic_to_the_byte(tmp_path: Path):
    contents = []
    for name, n, seed in (("a", 150, 0), ("b/b", 150, 0), ("c", 150, 1)):
        synthetic.generate(tmp_path / name, n, seed)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_layout_of_the_archive(generated: Path):
    path = generated / "cnn_synthetic" / f"cnn-synthetic-{SIZE}.tgz"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert members[0].name == "cnn/README"
        assert b"ynthetic" in archive.extractfile(members[0]).read()
        names = [member.name for member in members[1:]]
        for member in members[1:200]:
            content = archive.extractfile(member).read()
            name = hashlib.sha1(content).hexdigest()
            assert member.name.endswith(f"/{name}.question")
            assert format_question(parse_question(content, name)).encode() == content
    counts = Counter(name.rsplit("/", 1)[0] for name in names)
    assert counts == {
        "cnn/questions/training": 900, "cnn/questions/validation": 50, "cnn/questions/test": 50,
    }  # fmt: skip


def test_generated_questions_have_one_answer_in_the_passage():
    wordings = Counter[str]()
    numbers = Counter[str]()
    for number in range(300):
        question = synthetic.article("training", number)
        entities = {word for word in question.passage if questions.ENTITY.fullmatch(word)}
        assert 100 <= len(question.passage) <= 700
        assert 5 <= len(entities) <= 30
        assert question.answer in entities
        assert question.entities.keys() == entities
        named = [word for word in question.question if questions.ENTITY.fullmatch(word)]
        assert len(named) == 1
        assert named[0] in entities
        assert named[0] != question.answer
        # The question uses another wording than the passage, so the passage never contains it.
        stated = " ".join(question.question).replace("@placeholder", question.answer)
        assert f" {stated} " not in f" {' '.join(question.passage)} "
        wordings[stated.replace(named[0], "").replace(question.answer, "")] += 1
        numbers.update(entities)
    assert len(wordings) > 40
    assert len(numbers) > 495
    assert max(numbers.values()) < 30


def test_statistics_and_baselines_of_generated_questions(corpus: QuestionCorpus):
    assert 500 <= len(corpus.words) - len(corpus.entity_ids) <= 2000
    assert len(corpus.entity_ids) == synthetic.ENTITIES
    lengths = corpus.train.passages.lengths
    assert lengths.min() < 130
    assert lengths.max() > 600
    unknown = np.mean(np.asarray(corpus.train.passages.flat) == UNK)
    assert 0 < unknown < 0.01
    assert np.bincount(corpus.train.answers).max() < 20
    # The larger training split gives a smaller error, but naive Bayes has seen its answers.
    seen, valid = (baselines(corpus, part) for part in ("train", "valid"))
    print("train", seen, "valid", valid)
    assert seen["frequent"] < 0.25
    assert seen["frequent_other"] < 0.25
    assert valid["question"] < 0.05
    assert seen["beside"] < 0.5
    assert seen["random"] < 0.15


def test_baselines_find_what_is_there_to_find():
    # In every passage the answer is the most frequent entity, and the question determines it.
    def asked(k: int) -> Question:
        question = ("who sank @placeholder", "who sold @placeholder")[k]
        return ask(f"@entity{1 - k} sat . it is @entity{k} and @entity{k}", question, f"@entity{k}")

    found = question_corpus("easy", *[[asked(0), asked(1)] * 5] * 3)
    accuracies = baselines(found, "test")
    assert accuracies == {
        "frequent": 1, "frequent_other": 1, "beside": 0, "question": 1, "random": 0.5,
    }  # fmt: skip


def test_the_archive_is_generated_on_demand_and_again_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    path = tmp_path / "cnn_synthetic" / "cnn-synthetic-150.tgz"
    found = load_cnn(tmp_path, synthetic=150)
    assert [found.facts[part]["n"] for part in ("train", "valid", "test")] == [50, 50, 50]
    content, written = path.read_bytes(), path.stat().st_mtime_ns
    load_cnn(tmp_path, synthetic=150)
    assert path.stat().st_mtime_ns == written
    synthetic.generate(path, 150, seed=3)
    assert arrays(load_cnn(tmp_path, synthetic=150)) == arrays(found)
    assert path.read_bytes() == content
    monkeypatch.setattr(synthetic, "VERSION", 99)
    assert arrays(load_cnn(tmp_path, synthetic=150)) != arrays(found)
    assert sum("again" in record.getMessage() for record in caplog.records) == 2
    path.write_bytes(b"mine")
    assert "move it away" in error_of(load_cnn, tmp_path, synthetic=150)
    assert path.read_bytes() == b"mine"
    with pytest.raises(OutputError, match=r"^cannot write .*x\.tgz: File exists; .*data_dir"):
        synthetic.generate(path / "x.tgz", 150)


# --- batches --------------------------------------------------------------------------------------


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    entities = np.array([5, 7, 8, 12, 19, 20, 33, 34])
    passage = generator.integers(0, 40, (50, 6))
    return passage, generator.integers(0, 40, (9, 6)), generator.choice(entities, 6), entities


def test_relabelling_is_one_permutation_of_the_entities(batch):
    passage, question, answers, entities = batch
    kept = [array.copy() for array in batch]
    new = relabel_entities(
        passage.astype(np.int32), question, answers, entities, np.random.default_rng(0)
    )
    assert [array.dtype for array in new] == [np.int32, np.int64, np.int64]
    maps = []
    for column in range(6):
        old = [*passage[:, column], *question[:, column], answers[column]]
        renamed = [*new[0][:, column], *new[1][:, column], new[2][column]]
        pairs = {(int(a), int(b)) for a, b in zip(old, renamed, strict=True)}
        found = dict(pairs)
        # A one-to-one function that maps entities to entities and changes nothing else.
        assert len(found) == len(pairs) == len(set(found.values()))
        assert all((a in entities) == (b in entities) for a, b in pairs)
        assert all(a == b for a, b in pairs if a not in entities)
        maps.append({a: b for a, b in pairs if a in entities})
    merged = {(a, b) for found in maps for a, b in found.items()}
    assert len(merged) == len({a for a, _ in merged})  # the same in every column
    for before, after in zip(kept, batch, strict=True):
        np.testing.assert_array_equal(before, after)


def test_relabelling_is_uniform(batch):
    passage, question, answers, entities = batch
    answers = np.full(6, 12)
    generator = np.random.default_rng(0)
    counts = np.zeros(40)
    for _ in range(800):
        found = relabel_entities(passage, question, answers, entities, generator)[2]
        assert len(set(found)) == 1
        counts[found[0]] += 1
    assert counts[entities].sum() == 800
    # Each is expected 100 times, with standard deviation 9.4.
    assert np.abs(counts[entities] - 100).max() < 40


def test_without_entities_nothing_is_relabelled(batch):
    passage, question, answers, entities = batch
    generator = np.random.default_rng(0)
    found = relabel_entities(passage, question, answers, entities[:0], generator)
    assert all(a is b for a, b in zip(found, batch, strict=False))


def test_training_batches():
    lengths = np.random.default_rng(0).integers(1, 2000, 1003)
    batches = bucketed_batches(lengths, 10, np.random.default_rng(5))
    assert len(batches) == 100
    assert all(len(batch) == 10 for batch in batches)
    assert len(set(np.concatenate(batches).tolist())) == 1000
    again = bucketed_batches(lengths, 10, np.random.default_rng(5))
    assert [b.tolist() for b in again] == [b.tolist() for b in batches]
    other = bucketed_batches(lengths, 10, np.random.default_rng(6))
    assert {frozenset(b.tolist()) for b in other}.isdisjoint(frozenset(b.tolist()) for b in batches)

    def padding(batches: list[np.ndarray]) -> float:
        longest = sum(len(batch) * lengths[batch].max() for batch in batches)
        return 1 - lengths[np.concatenate(batches)].sum() / longest

    plain = bucketed_batches(lengths, 10, np.random.default_rng(5), buckets=1)
    assert padding(batches) < 0.15
    assert padding(plain) > 0.3
    # The batches of a bucket do not stay in order of length.
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
    assert bucketed_batches(lengths[:9], 10, np.random.default_rng(0)) == []


def test_the_examples_left_out_are_random_ones():
    lengths = np.arange(15)
    left = [
        (set(range(15)) - set(np.concatenate(batches).tolist())).pop()
        for seed in range(300)
        if (batches := bucketed_batches(lengths, 7, np.random.default_rng(seed)))
    ]
    assert np.bincount(left, minlength=15).min() > 5


@pytest.mark.parametrize("n", [2, 3, 4, 5, 63, 64, 65, 128, 129, 3924])
@pytest.mark.parametrize("size", [3, 64])
def test_evaluation_batches(n: int, size: int):
    lengths = np.random.default_rng(0).integers(1, 2000, n)
    batches = bucketed_batches(lengths, size, None)
    found = np.concatenate(batches)
    assert sorted(found.tolist()) == list(range(n))
    assert (np.diff(lengths[found]) <= 0).all()
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 2
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == -(-n // size)


def test_evaluation_batches_at_the_edges():
    def sizes(n: int, size: int) -> list[int]:
        return [len(batch) for batch in bucketed_batches(np.ones(n, np.int32), size, None)]

    assert sizes(0, 4) == []
    assert sizes(1, 4) == [1]
    assert sizes(3, 1) == [1, 1, 1]
    assert sizes(5, 2) == [3, 2]


def test_padding():
    rows = [np.array([7, 8, 9], np.int32), np.array([4], np.int32)]
    ids, lengths = pad(rows)
    assert ids.T.tolist() == [[7, 8, 9], [4, 0, 0]]
    assert (ids.dtype, lengths.dtype, lengths.tolist()) == (np.int64, np.int64, [3, 1])
    assert pad([])[0].shape == (0, 0)
