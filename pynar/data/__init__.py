"""Parallel text, tokenizers, memory-mapped corpora and batches."""

from pynar.data.batching import Batch, Batches, collate
from pynar.data.corpus import Corpus, CorpusWriter
from pynar.data.manifest import CorpusError, FileInfo, Manifest, SplitInfo, verify
from pynar.data.prepare import prepare
from pynar.data.text import TextError, iter_lines, read_lines, read_pairs
from pynar.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "CorpusError",
    "CorpusWriter",
    "FileInfo",
    "Manifest",
    "SplitInfo",
    "TextError",
    "Tokenizer",
    "collate",
    "iter_lines",
    "prepare",
    "read_lines",
    "read_pairs",
    "verify",
]
