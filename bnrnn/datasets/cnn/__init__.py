"""The CNN question-answering corpus: files, vocabulary, generated substitute and batches."""
