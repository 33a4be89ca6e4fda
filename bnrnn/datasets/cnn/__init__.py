"""The CNN question-answering corpus: its files, vocabulary, generated stand-in and batches."""
