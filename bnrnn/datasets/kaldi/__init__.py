"""Kaldi archives: matrices and vectors of integers by utterance, read one at a time.

An archive is named as in Kaldi: `ark:FILE`, `scp:FILE`, or FILE alone. FILE alone is an scp table
if its name ends in .scp or .scp.gz. Supported: binary and text objects, compressed matrices,
gzipped files, several files by a glob pattern (`pdf.*.gz`), and ranges (`feats.ark:11[0:99]`).

Archives are untrusted, but `kaldiio` trusts them. It executes names that begin or end in `|`, even
before an offset or a range (`cmd |:7`, `cmd |[0:5]`), unpickles content that begins with PKL, and
passes content that begins with NPY, AUDIO, fLaC or RIFF to other readers. This package therefore
passes it neither names nor files, only the bytes of one binary matrix whose header was checked.
Commands run only if `pipes` is true, once each. Their output is kept in an unnamed temporary file,
as is the content of a gzipped archive, because neither can be read at random positions.
"""

from bnrnn.datasets.kaldi.archive import Archive

__all__ = ["Archive"]
