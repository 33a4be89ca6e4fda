"""Kaldi archives: read as kaldiio writes them, in bounded memory, without executing anything."""

import contextlib
import gzip
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import kaldiio
import numpy as np
import pytest

from bnrnn.datasets.kaldi import Archive, files, objects
from bnrnn.errors import BnrnnError, ConfigError, DataError
from tests.conftest import ROOT


@pytest.fixture
def matrices():
    generator = np.random.default_rng(0)
    return {f"utt-{n}": generator.normal(size=(n, 5)).astype(np.float32) for n in (3, 12, 30)}


@pytest.fixture
def vectors():
    generator = np.random.default_rng(1)
    return {f"utt-{n}": generator.integers(0, 2000, n).astype(np.int32) for n in (3, 12, 30)}


def write(folder, arrays, name="a", **how):
    """Write an ark and its scp with kaldiio."""
    kaldiio.save_ark(f"{folder}/{name}.ark", arrays, scp=f"{folder}/{name}.scp", **how)
    return folder / f"{name}.ark", folder / f"{name}.scp"


def write_text(path, arrays):
    """Write text as Kaldi's copy-feats and copy-int-vector do."""
    lines = []
    for name, array in arrays.items():
        if array.ndim == 1:
            lines.append(f"{name} {' '.join(map(str, array))} \n")
        else:
            rows = "".join("\n  " + " ".join(f"{x:.9g}" for x in row) + " " for row in array)
            lines.append(f"{name}  [{rows}]\n")
    path.write_text("".join(lines))
    return path


def equal(archive, arrays):
    assert list(archive) == list(arrays)
    for name, array in arrays.items():
        found = archive.read(name)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == (np.int32 if array.ndim == 1 else np.float32)
        assert archive.rows[name] == len(array)


def test_round_trip_of_matrices(tmp_path, matrices):
    ark, scp = write(tmp_path, matrices)
    double = write(tmp_path, {k: v.astype(np.float64) for k, v in matrices.items()}, "double")[0]
    text = write_text(tmp_path / "text.ark", matrices)
    gz = tmp_path / "a.ark.gz"
    gz.write_bytes(gzip.compress(ark.read_bytes()))
    text_gz = tmp_path / "text.ark.gz"
    text_gz.write_bytes(gzip.compress(text.read_bytes()))
    scp_gz = tmp_path / "b.scp.gz"
    scp_gz.write_bytes(gzip.compress(scp.read_bytes()))
    for specifier in (
        ark, scp, double, text, gz, text_gz, scp_gz, f"ark:{ark}", f"scp:{scp}", f"ark,t:{text}",
        f"scp,s,cs:{scp}",
    ):  # fmt: skip
        equal(Archive(str(specifier), "matrix"), matrices)


def test_round_trip_of_integers(tmp_path, vectors):
    ark, scp = write(tmp_path, vectors)
    text = write_text(tmp_path / "text.ark", vectors)
    brackets = write(tmp_path, vectors, "brackets", text=True)[0]
    gz = tmp_path / "ali.1.gz"
    gz.write_bytes(gzip.compress(text.read_bytes()))
    for specifier in (ark, scp, text, brackets, gz):
        equal(Archive(str(specifier), "integers"), vectors)


@pytest.mark.parametrize("method", [1, 2, 3, 5])
def test_compressed_matrices_are_decoded_as_by_kaldiio(tmp_path, matrices, method):
    ark, scp = write(tmp_path, matrices, compression_method=method)
    expected = dict(kaldiio.load_ark(str(ark)))
    for specifier in (ark, scp):
        equal(Archive(str(specifier), "matrix"), expected)
    for name, array in matrices.items():
        np.testing.assert_allclose(expected[name], array, atol=0.1)


def test_a_text_matrix_may_begin_with_a_number_without_a_point(tmp_path):
    arrays = {"a": np.array([[1, 2.5], [-3e-5, 4]], np.float32)}
    equal(Archive(str(write_text(tmp_path / "t.ark", arrays)), "matrix"), arrays)


def test_what_no_float32_can_hold_is_infinite(tmp_path):
    wide = {"a": np.array([[1e300, 1.0], [-1e300, 2.0]])}
    ark, _ = write(tmp_path, wide)
    (tmp_path / "t.ark").write_text("a [ 1e300 1\n -1e300 2 ]\n")
    for path in (ark, tmp_path / "t.ark"):
        found = Archive(str(path), "matrix").read("a")
        np.testing.assert_array_equal(found, [[np.inf, 1], [-np.inf, 2]])


def test_a_pattern_is_all_files_that_fit_in_the_order_of_their_numbers(tmp_path, vectors):
    for number, (name, vector) in zip((2, 10, 1), vectors.items(), strict=True):
        text = write_text(tmp_path / "t", {name: vector}).read_bytes()
        (tmp_path / f"ali.{number}.gz").write_bytes(gzip.compress(text))
    found = Archive(f"{tmp_path}/ali.*.gz", "integers")
    a, b, c = vectors
    assert list(found) == [c, a, b]


def test_a_table_names_files_beside_it_or_in_the_current_folder(tmp_path, matrices, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    kaldiio.save_ark("a.ark", matrices, scp="a.scp")
    monkeypatch.chdir(tmp_path)
    equal(Archive("there/a.scp", "matrix"), matrices)
    (tmp_path / "b.scp").write_text((there / "a.scp").read_text().replace("a.ark", "there/a.ark"))
    monkeypatch.chdir(tmp_path)
    equal(Archive(str(tmp_path / "b.scp"), "matrix"), matrices)


def test_ranges(tmp_path, matrices):
    _, scp = write(tmp_path, matrices)
    lines = scp.read_text().splitlines()
    ranges = ["[0:1]", "[2:11,1:3]", "[:,4:4]"]
    scp.write_text("".join(f"{line}{r}\n" for line, r in zip(lines, ranges, strict=True)))
    found = Archive(str(scp), "matrix")
    a, b, c = matrices
    np.testing.assert_array_equal(found.read(a), matrices[a][0:2])
    np.testing.assert_array_equal(found.read(b), matrices[b][2:12, 1:4])
    np.testing.assert_array_equal(found.read(c), matrices[c][:, 4:5])
    assert found.columns == {a: 5, b: 3, c: 1}


def test_what_is_read_at_first_is_headers_only(tmp_path):
    """Opening an archive with 100 MB of features takes only the memory of the names."""
    frames = np.zeros((5000, 100), np.float32)
    ark, scp = write(tmp_path, {f"u{k}": frames for k in range(50)})
    for specifier in (ark, scp):
        tracemalloc.start()
        archive = Archive(str(specifier), "matrix")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        archive.read("u49")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()


def test_many_files_are_not_open_at_once(tmp_path, matrices):
    lines = []
    for k in range(files.MOST_OPEN + 20):
        kaldiio.save_mat(f"{tmp_path}/{k}.mat", matrices["utt-3"])
        lines.append(f"u{k} {k}.mat\n")
    (tmp_path / "a.scp").write_text("".join(lines))
    before = len(os.listdir("/proc/self/fd"))
    archive = Archive(str(tmp_path / "a.scp"), "matrix")
    for name in [*archive, *archive]:
        np.testing.assert_array_equal(archive.read(name), matrices["utt-3"])
    assert len(os.listdir("/proc/self/fd")) <= before + files.MOST_OPEN
    del archive
    assert len(os.listdir("/proc/self/fd")) <= before


# ------------------------------------------------------------------------------------ commands


def test_a_command_runs_only_where_pipes_are_allowed(tmp_path, matrices):
    ark, scp = write(tmp_path, matrices)
    mark = tmp_path / "ran"
    for specifier in (f"touch {mark}; cat {ark} |", f"ark:touch {mark}; cat {ark} |",
                      f"scp:touch {mark}; cat {scp} |"):  # fmt: skip
        with pytest.raises(ConfigError, match=r"data\.features is a command"):
            Archive(specifier, "matrix")
        assert not mark.exists()
        equal(Archive(specifier, "matrix", pipes=True), matrices)
        assert mark.exists()
        mark.unlink()
    with pytest.raises(DataError, match="failed with exit code 3"):
        Archive("exit 3 |", "matrix", pipes=True)


@pytest.mark.parametrize(
    "form", ["{} |", "{} |  ", "| {}", "{} |:0", "{} |[0:1]", "{} |:0[0:1]", "{} | [0:1]", "|{} |"]
)
def test_a_command_in_a_table_runs_only_where_pipes_are_allowed(tmp_path, matrices, form):
    mark = tmp_path / "ran"
    kaldiio.save_mat(f"{tmp_path}/m", matrices["utt-12"])
    line = form.format(f"touch {mark}; cat {tmp_path}/m")
    (tmp_path / "a.scp").write_text(f"u1 {tmp_path}/m:0\nu2 {line}\n")
    with pytest.raises(DataError, match=r"line 2 is a command.*data\.pipes=true"):
        Archive(str(tmp_path / "a.scp"), "matrix")
    assert not mark.exists()
    archive = Archive(str(tmp_path / "a.scp"), "matrix", pipes=True)
    assert mark.exists()
    mark.unlink()
    rows = 2 if "[0:1]" in form else 12
    np.testing.assert_array_equal(archive.read("u2"), matrices["utt-12"][:rows])
    assert not mark.exists()  # the command runs once, not at every read


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_nothing_in_an_archive_is_executed_or_given_to_another_reader(tmp_path):
    """Objects that kaldiio would unpickle, load or pass to an audio library.

    They are read in a process that ends if a command is run, a pickle is loaded or such a library
    is imported.
    """
    npy = tmp_path / "object.npy"
    np.save(npy, np.array([Exploit()], dtype=object), allow_pickle=True)
    content = npy.read_bytes()
    length = bytes([2]) + len(content).to_bytes(2, "little")
    objects = [
        b"PKL" + pickle.dumps(Exploit()), b"NPY" + length + content, b"AUDIO\1\4abcd",
        b"fLaC" + bytes(50), b"RIFF" + bytes(50), content, pickle.dumps(Exploit()), b"PK\3\4",
        b"\0BPKL ", b" PKL" + pickle.dumps(Exploit()),
    ]  # fmt: skip
    for k, each in enumerate(objects):
        (tmp_path / f"{k}.ark").write_bytes(b"utt " + each)
        (tmp_path / f"{k}.scp").write_text(f"utt {k}.ark:4\n")
        (tmp_path / f"{k}.ark.gz").write_bytes(gzip.compress(b"utt " + each))
    script = """
import sys
from pathlib import Path
import bnrnn.datasets.kaldi as kaldi
from bnrnn.errors import DataError
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "pickle.find_class", "os.exec", "exec", "compile"):
        sys.stderr.write(f"{event} {arguments}\\n"); sys.stderr.flush(); import os; os._exit(7)
    if event == "import" and arguments[0].split(".")[0] in ("soundfile", "h5py", "wave"):
        import os; os._exit(8)
sys.addaudithook(hook)
n = 0
for path in sorted(Path(".").glob("*.ark")) + sorted(Path(".").glob("*.scp")) + sorted(Path(".").glob("*.gz")):
    for kind in ("matrix", "integers"):
        try:
            archive = kaldi.Archive(str(path), kind)
            archive.read("utt")
        except DataError:
            n += 1
        else:
            raise SystemExit(f"{path} was read")
print(n)
"""  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(objects) * 6
    assert not (tmp_path / "exploited").exists()


def test_only_checked_bytes_reach_kaldiio():
    """The reader imports no function of kaldiio that could open files."""
    sources = Path(objects.__file__).parent.glob("*.py")
    text = "\n".join(source.read_text() for source in sources)
    lines = [line for line in text.splitlines() if line.startswith(("from kaldiio", "import kald"))]
    assert lines == ["from kaldiio.matio import read_kaldi"]
    assert text.count("read_kaldi(") == 1


# ------------------------------------------------------------------------------------ damage


def read_all(specifier, kind):
    archive = Archive(str(specifier), kind)
    for name in archive:
        assert archive.read(name).shape[0] == archive.rows[name]


def fails(specifier, kind="matrix"):
    """Return the message of the DataError when the archive is opened or read."""
    tracemalloc.start()
    try:
        with pytest.raises(BnrnnError) as caught:
            read_all(specifier, kind)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert message.isprintable()
    assert "; " in message
    return message


def test_files_that_are_none(tmp_path, matrices):
    ark, scp = write(tmp_path, matrices)
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (
        ("missing", "No such file"), (".", "a folder"), ("fifo", "a named pipe"),
    ):  # fmt: skip
        place = tmp_path / name
        for specifier in (place, f"scp:{place}", f"ark:{place}"):
            assert reason in fails(specifier)
        (tmp_path / "t.scp").write_text(f"utt {place}:4\n")
        assert reason in fails(tmp_path / "t.scp")
    assert "a device" in fails("/dev/zero")
    assert "no file matches" in fails(tmp_path / "none.*.gz")
    assert "standard input" in fails("-")
    assert "standard input" in fails("ark:-")
    ark.unlink()
    assert "a.ark: No such file" in fails(scp)


def test_an_offset_beyond_the_file(tmp_path, matrices):
    ark, scp = write(tmp_path, matrices)
    for offset in (ark.stat().st_size, 10**12, -1):
        scp.write_text(f"utt-3 {ark}:{offset}\n")
        assert f"utterance utt-3 at byte {offset}: the file has" in fails(scp)
    scp.write_text(f"utt-3 {ark}:7\n")  # not the beginning of an object
    assert "utterance utt-3" in fails(scp)


def test_an_archive_cut_anywhere(tmp_path, matrices, vectors):
    """A truncated archive is never read as if it were complete, and never gives a traceback."""
    for arrays, kind in ((matrices, "matrix"), (vectors, "integers")):
        ark, scp = write(tmp_path, {"utt-3": arrays["utt-3"], "utt-12": arrays["utt-12"]})
        whole = ark.read_bytes()
        second = int(scp.read_text().split(":")[-1]) - len("utt-12 ")
        for cut in range(1, len(whole)):
            ark.write_bytes(whole[:cut])
            if cut != second:
                fails(ark, kind)
            fails(scp, kind)


@pytest.mark.parametrize("how", ["matrix", "integers", "CM", "text"])
def test_an_archive_with_any_byte_changed(tmp_path, matrices, vectors, how):
    """Either the object is read with the size in its header, or it raises a DataError."""
    kind = "integers" if how == "integers" else "matrix"
    arrays = {"u": (vectors if kind == "integers" else matrices)["utt-3"]}
    if how == "text":
        ark = write_text(tmp_path / "t.ark", arrays)
    else:
        ark, _ = write(tmp_path, arrays, compression_method=1 if how == "CM" else None)
    whole = ark.read_bytes()
    generator = np.random.default_rng(2)
    for position in range(len(whole)):
        for value in (0, 255, int(generator.integers(256))):
            ark.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            with contextlib.suppress(DataError):
                read_all(ark, kind)


def test_headers_that_claim_too_much_or_nothing_sensible(tmp_path):
    cases = {
        b"\0BFM \4" + struct.pack("<iBi", 2**30, 4, 2**30): "more than",
        b"\0BFM \4" + struct.pack("<iBi", 1000, 4, 40): "the file ends too early",
        b"\0BFM \4" + struct.pack("<iBi", -1, 4, 40): "negative",
        b"\0BFM \4" + struct.pack("<iBi", -1, 4, -40): "negative",
        b"\0BFM \5" + struct.pack("<iBi", 1, 4, 40): "damaged",
        b"\0BCM " + struct.pack("<ffii", 0, 1, 2**30, 2**30): "more than",
        b"\0BCM " + struct.pack("<ffii", np.nan, 1, 1, 1): "not finite",
        b"\0BFV \4" + struct.pack("<i", 0): "type b'FV'",
        b"\0B\4" + struct.pack("<i", 2**31 - 1): "more than",
        b"\0B\4" + struct.pack("<i", -5): "negative",
        b"\0BSM rest": "type b'SM'",
        b"\0BFM": "ends in its header",
        b"\0B": "type",
        b"[ 1 2\n 3 ]\n": "different length",
        b"[ 1 2": "ends too early",
        b"1 2 3\n": "a vector, not a matrix",
        b"hello\n": "neither a binary nor a text object",
        b"\x1f\x8b": "gzipped",
    }
    for content, reason in cases.items():
        (tmp_path / "a.ark").write_bytes(b"utt " + content)
        assert reason in fails(tmp_path / "a.ark"), content


def test_what_is_no_vector_of_integers(tmp_path, matrices):
    ark, _ = write(tmp_path, matrices)
    assert "a matrix of features, not a vector of integers" in fails(ark, "integers")
    for content in (b"1.5 2\n", b"99999999999 1\n", b"[ 1 nan ]\n", b"1 -\n"):
        (tmp_path / "t.ark").write_bytes(b"utt " + content)
        assert "utterance utt" in fails(tmp_path / "t.ark", "integers")
    ark, _ = write(tmp_path, {"utt": np.arange(3, dtype=np.int32)}, "v")
    assert "a vector of integers, not a matrix" in fails(ark)
    content = bytearray(ark.read_bytes())
    content[-5] = 8  # the width of the last integer
    ark.write_bytes(content)
    assert "its integers are damaged" in fails(ark, "integers")


def test_tables_that_are_none(tmp_path, matrices):
    ark, scp = write(tmp_path, matrices)
    line = scp.read_text().splitlines()[0]
    cases = {
        b"utt\xff\xfe a:1\n": "line 1 is not UTF-8",
        b"\n" + line.encode() + b"\nutt\n": "line 3 has no location",
        line.encode() + b"\n" + line.encode() + b"\n": "utterance utt-3 occurs twice",
        b"a" * 70_000: "line 1 is longer",
        b"u\x1b[31m /x:1\n": "line 1 does not begin with an utterance's name",
        b"": "has no utterances",
        f"u {ark}:8[5:9]\n".encode(): "utterance u",
    }
    for content, reason in cases.items():
        scp.write_bytes(content)
        assert reason in fails(scp), content
    scp.write_text(line.replace(" ", " nul\0", 1))
    fails(scp)
    ark.write_bytes(ark.read_bytes() + ark.read_bytes())
    assert "occurs twice" in fails(ark)


def test_a_gzip_that_expands_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SLACK", 1 << 18)
    bomb = gzip.compress(bytes(24 << 20))  # compressed 1000:1
    for name in ("a.ark.gz", "b.scp.gz"):
        (tmp_path / name).write_bytes(bomb)
    assert "unpacks to more than" in fails(tmp_path / "a.ark.gz")
    assert "line 1 is longer" in fails(tmp_path / "b.scp.gz")
    (tmp_path / "c.scp.gz").write_bytes(gzip.compress(b"\n" * (2 << 20)))
    assert "longer than a table" in fails(tmp_path / "c.scp.gz")
    for content in (bomb[:1000], bomb[:100] + bytes(50), bomb[:-4] + b"abcd", b"\x1f\x8b"):
        for name in ("a.ark.gz", "b.scp.gz"):
            (tmp_path / name).write_bytes(content)
            fails(tmp_path / name)


def test_a_file_that_changes_after_it_was_opened(tmp_path, matrices):
    ark, scp = write(tmp_path, matrices)
    archive = Archive(str(scp), "matrix")
    name = "utt-30"
    whole = ark.read_bytes()
    ark.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="ends too early"):
        archive.read(name)
    shorter = {"utt-3": matrices["utt-3"], "utt-12": matrices["utt-12"], name: matrices[name][:20]}
    kaldiio.save_ark(str(ark), shorter)
    with pytest.raises(DataError, match="has changed"):
        archive.read(name)


def test_no_space_to_unpack(tmp_path, matrices, monkeypatch):
    ark, _ = write(tmp_path, matrices)
    (tmp_path / "a.ark.gz").write_bytes(gzip.compress(ark.read_bytes()))
    monkeypatch.setattr(files, "SPARED", 1 << 60)
    with pytest.raises(BnrnnError, match="no space left; free some, or set TMPDIR") as caught:
        Archive(str(tmp_path / "a.ark.gz"), "matrix")
    assert caught.value.exit_code == 6
