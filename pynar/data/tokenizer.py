"""Text to token ids and back: one SentencePiece model for both sides, or one for each."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from pynar.symbols import BOS, EOS, MASK, NAMES, PAD, UNK

__all__ = ["Tokenizer"]

JOINT_FILE = "tokenizer.model"
SOURCE_FILE, TARGET_FILE = "source.model", "target.model"
MODEL_TYPES = ("unigram", "bpe")
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")

# SentencePiece sums its expectations by thread, so that the model depends on their number:
# a constant, not the machine's, keeps it reproducible.
TRAINING_THREADS = 4
# Longer lines would be skipped silently by the trainer.
MAX_LINE_BYTES = 1 << 20


def cpu_count() -> int:
    """Returns the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _train(lines: Iterable[str], side: str, options: dict[str, Any]) -> bytes:
    # SentencePiece cannot store NUL in a piece and complains about lines that hold one.
    lines = (line.replace("\0", " ") for line in lines)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            pad_piece=NAMES[PAD],
            bos_piece=NAMES[BOS],
            eos_piece=NAMES[EOS],
            unk_piece=NAMES[UNK],
            control_symbols=NAMES[MASK],
            shuffle_input_sentence=False,
            num_threads=TRAINING_THREADS,
            max_sentence_length=MAX_LINE_BYTES,
            minloglevel=2,
            **options,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(_explain(str(error), side, options["vocab_size"])) from error
    return model.getvalue()


def _explain(message: str, side: str, vocab_size: int) -> str:
    """Turns a failure of SentencePiece's trainer into what the user can do about it."""
    if found := re.search(r"too high.*value <= (\d+)", message):
        return (
            f"vocab_size must be at most {found[1]} for the {side} text, which has no more "
            f"pieces to offer, got {vocab_size}"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size must be at least {found[1]} to hold every character of the {side} text, "
            f"got {vocab_size}; or lower character_coverage"
        )
    return f"SentencePiece could not train on the {side} text: {message}"


def _load(model: bytes, name: object) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{name} is not a SentencePiece model: {error}") from error
    for index, piece in enumerate(NAMES):
        found = processor.id_to_piece(index) if index < processor.get_piece_size() else None
        special = processor.is_unknown(index) if index == UNK else processor.is_control(index)
        if found != piece or not special:
            raise ValueError(
                f"{name}: piece {index} must be the special symbol {piece!r}, got {found!r}; train "
                f"the model with Tokenizer.train or with pad_id=0, bos_id=1, eos_id=2, unk_id=3 "
                f"and control_symbols='<mask>'"
            )
    return processor


class Tokenizer:
    """A SentencePiece model for both sides (``joint``), or one for each side.

    The special symbols have the ids of ``pynar.symbols`` on both sides. No input text can produce
    padding, sentence ends or the mask: a literal ``<mask>`` is encoded as ordinary pieces.
    U+2581, SentencePiece's own sign for a space, is read as a space.

    >>> lines = ["a b c d", "b c d e"] * 10
    >>> tokenizer = Tokenizer.train(lines, lines, vocab_size=12)
    >>> tokenizer.decode_target(tokenizer.encode_source(["d c b a"]))
    ['d c b a']
    """

    def __init__(self, source_model: bytes, target_model: bytes | None = None) -> None:
        """Wraps serialized SentencePiece models; without ``target_model`` it is joint."""
        self._models = (source_model,) if target_model is None else (source_model, target_model)
        names = ("tokenizer",) if target_model is None else ("source tokenizer", "target tokenizer")
        processors = [_load(model, name) for model, name in zip(self._models, names, strict=True)]
        self.source, self.target = processors[0], processors[-1]

    @classmethod
    def train(
        cls,
        source_lines: Iterable[str],
        target_lines: Iterable[str],
        *,
        vocab_size: int,
        joint: bool = True,
        model_type: str = "unigram",
        character_coverage: float = 1.0,
        byte_fallback: bool = False,
        split_digits: bool = False,
        normalization: str = "identity",
    ) -> "Tokenizer":
        """Trains on two lists of lines; the result depends on nothing but the arguments.

        ``vocab_size`` counts the five special symbols, and holds for each side where ``joint`` is
        false. With ``byte_fallback`` a character outside the vocabulary becomes its UTF-8 bytes
        instead of the unknown symbol. ``normalization`` other than ``"identity"`` changes the
        text, so that decoding gives the normalised form.

        Raises ``ValueError`` for a vocabulary that the text cannot fill (naming the largest
        possible size) or that cannot hold its characters, and for unknown options.
        """
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {MODEL_TYPES}, got {model_type!r}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}"
            )
        if vocab_size <= len(NAMES):
            raise ValueError(
                f"vocab_size must exceed the {len(NAMES)} special symbols, got {vocab_size}"
            )
        if not 0 < character_coverage <= 1:
            raise ValueError(f"character_coverage must be in (0, 1], got {character_coverage}")
        options = {
            "vocab_size": vocab_size,
            "model_type": model_type,
            "character_coverage": character_coverage,
            "byte_fallback": byte_fallback,
            "split_digits": split_digits,
            "normalization_rule_name": normalization,
        }
        if joint:

            def both() -> Iterable[str]:
                yield from source_lines
                yield from target_lines

            return cls(_train(both(), "joint", options))
        return cls(_train(source_lines, "source", options), _train(target_lines, "target", options))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Loads a directory written by ``save``, or one model file, which is then joint.

        Raises ``FileNotFoundError`` where there is none, and ``ValueError`` for a file that is no
        SentencePiece model or whose special symbols have other ids.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"tokenizer {path} does not exist")
        if path.is_file():
            files = [path]
        elif (path / JOINT_FILE).is_file():
            files = [path / JOINT_FILE]
        else:
            files = [path / SOURCE_FILE, path / TARGET_FILE]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(
                        f"{path} holds no tokenizer: expected {JOINT_FILE}, or {SOURCE_FILE} and "
                        f"{TARGET_FILE}"
                    )
        models = [file.read_bytes() for file in files]
        for model, file in zip(models, files, strict=True):
            _load(model, file)
        return cls(*models)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.model``, or ``source.model`` and ``target.model``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, model in zip(self.files, self._models, strict=True):
            (directory / name).write_bytes(model)

    @property
    def joint(self) -> bool:
        """Whether both sides share one model."""
        return len(self._models) == 1

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that ``save`` writes."""
        return (JOINT_FILE,) if self.joint else (SOURCE_FILE, TARGET_FILE)

    @property
    def digest(self) -> str:
        """SHA-256 of the models: equal for tokenizers that encode alike."""
        parts = [hashlib.sha256(model).hexdigest() for model in self._models]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def source_size(self) -> int:
        """Number of source pieces, the special symbols included."""
        return self.source.get_piece_size()

    @property
    def target_size(self) -> int:
        """Number of target pieces, the special symbols included."""
        return self.target.get_piece_size()

    def encode_source(self, lines: Sequence[str], *, threads: int | None = None) -> list[list[int]]:
        """Returns the source ids of each line, with neither BOS nor EOS; an empty line has none."""
        return _encode(self.source, lines, threads)

    def encode_target(self, lines: Sequence[str], *, threads: int | None = None) -> list[list[int]]:
        """Returns the target ids of each line, with neither BOS nor EOS; an empty line has none."""
        return _encode(self.target, lines, threads)

    def decode_source(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """Returns the text of source ids; see ``decode_target``."""
        return _decode(self.source, ids)

    def decode_target(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """Returns the text of each sequence of target ids.

        PAD, BOS, EOS and MASK leave no trace; UNK shows as ``⁇``, so that nothing is lost
        silently. Text with single spaces between words, of known characters, comes back as it
        was. Raises ``ValueError`` for an id outside the vocabulary.
        """
        return _decode(self.target, ids)


def _encode(
    processor: sentencepiece.SentencePieceProcessor, lines: Sequence[str], threads: int | None
) -> list[list[int]]:
    if isinstance(lines, str):
        raise ValueError("lines must be a list of strings, got one string")
    # Threads start anew with every call: not worth it for the few lines of one batch.
    threads = threads or min(cpu_count(), 1 + len(lines) // 512)
    return processor.encode(list(lines), out_type=int, num_threads=threads)


_DROPPED = frozenset((PAD, BOS, EOS, MASK))


def _decode(
    processor: sentencepiece.SentencePieceProcessor, ids: Iterable[Sequence[int]]
) -> list[str]:
    size = processor.get_piece_size()
    kept = []
    for sequence in ids:
        sequence = [int(i) for i in sequence]
        if sequence and not (0 <= min(sequence) and max(sequence) < size):
            wrong = next(i for i in sequence if not 0 <= i < size)
            raise ValueError(f"token ids must be in [0, {size}), got {wrong}")
        kept.append([i for i in sequence if i not in _DROPPED])
    return [processor.decode(sequence) if sequence else "" for sequence in kept]
