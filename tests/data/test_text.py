"""Lines end at ``\\n`` alone, whatever else a text holds."""

import doctest
import gzip
import io
import os
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pynar.data.text
import pynar.data.tokenizer
from pynar.data import TextError, iter_lines, read_lines, read_pairs
from pynar.data.text import BLOCK_BYTES, sha256_file

AWKWARD = "a b\u2028\u2029\u0085\r\n\0\v\f\x1c\x1e\t\ufeffß漢😀"


def expected_lines(text: str) -> list[str]:
    """The rule in three lines, on text in memory."""
    lines = text.removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line[:-1] if line.endswith("\r") else line for line in lines]


@pytest.mark.parametrize("module", [pynar.data.text, pynar.data.tokenizer])
def test_docstring_examples_run(module):
    assert doctest.testmod(module).failed == 0


@given(st.text(alphabet=AWKWARD, max_size=60), st.booleans())
def test_lines_follow_the_rule(text, compressed):
    data = text.encode()
    stream = io.BytesIO(gzip.compress(data) if compressed else data)
    assert read_lines(stream) == expected_lines(text)
    assert not stream.closed


@settings(max_examples=30)
@given(st.lists(st.text(alphabet=AWKWARD.replace("\n", ""), max_size=20), max_size=20))
def test_block_borders_do_not_matter(lines):
    text = "\n".join(lines)

    class Dribble(io.RawIOBase):
        """Gives three bytes at a time: borders fall inside characters and line ends."""

        def __init__(self):
            self.rest = io.BytesIO(text.encode())

        def readable(self):
            return True

        def readinto(self, buffer):
            piece = self.rest.read(min(3, len(buffer)))
            buffer[: len(piece)] = piece
            return len(piece)

    assert read_lines(Dribble()) == expected_lines(text)


def test_line_longer_than_a_block(tmp_path):
    long = "x" * (2 * BLOCK_BYTES + 7)
    (tmp_path / "f").write_text(f"a\n{long}\nb")
    assert read_lines(tmp_path / "f") == ["a", long, "b"]


def test_name_of_the_file_does_not_decide_about_gzip(tmp_path):
    (tmp_path / "plain.gz").write_bytes(b"plain\n")
    (tmp_path / "packed.txt").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    assert read_lines(tmp_path / "plain.gz") == ["plain"]
    assert read_lines(str(tmp_path / "packed.txt")) == ["one", "two"]


def test_lines_of_a_pipe_come_as_they_arrive():
    read, write = os.pipe()
    with open(read, "rb") as reader, open(write, "wb", buffering=0) as writer:
        writer.write(b"first\nsec")
        lines = iter_lines(reader)
        got = []
        thread = threading.Thread(target=lambda: got.append(next(lines)), daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert got == ["first"]
        writer.write(b"ond\n")
        assert next(lines) == "second"


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"a\nb"))))
    assert read_lines("-") == ["a", "b"]


@pytest.mark.parametrize("lines_before", [0, 3, 200_000])
def test_invalid_utf8_names_file_line_and_byte(tmp_path, lines_before):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"some text\n" * lines_before + b"caf\xe9 noir\nrest\n")
    with pytest.raises(TextError, match=rf"bad\.txt: line {lines_before + 1} .*byte 4 .*0xe9"):
        read_lines(path)


def test_utf16_is_refused_at_line_1(tmp_path):
    (tmp_path / "wide.txt").write_text("text\n", encoding="utf-16")
    with pytest.raises(TextError, match=r"wide\.txt: line 1 is not valid UTF-8"):
        read_lines(tmp_path / "wide.txt")


def test_damaged_gzip_names_the_file(tmp_path):
    whole = gzip.compress("".join(f"line {i}\n" for i in range(5000)).encode())
    path = tmp_path / "cut.gz"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[:2], whole[:5], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(
            TextError, match=r"cut\.gz: (damaged or truncated gzip|line \d+ is not)"
        ):
            read_lines(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        read_lines(tmp_path / "nowhere.txt")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        read_lines(tmp_path)


def test_pairs_of_two_files(tmp_path):
    (tmp_path / "s").write_bytes("eins\u2028\r\n\nd\rei".encode())
    (tmp_path / "t").write_bytes(b"one\n\0\nthree\n")
    wanted = [("eins\u2028", "one"), ("", "\0"), ("d\rei", "three")]
    assert list(read_pairs(tmp_path / "s", tmp_path / "t")) == wanted


def test_pairs_of_a_table(tmp_path):
    (tmp_path / "x.tsv").write_bytes("eins\u0085\tone\r\n\tempty\n".encode())
    assert list(read_pairs(tmp_path / "x.tsv")) == [("eins\u0085", "one"), ("", "empty")]


@pytest.mark.parametrize("line, count", [("no tab", 1), ("a\tb\tc", 3), ("", 1)])
def test_table_with_other_columns(tmp_path, line, count):
    (tmp_path / "x.tsv").write_text(f"a\tb\n{line}\nc\td\n")
    with pytest.raises(TextError, match=rf"x\.tsv: line 2 must have 2 columns .* got {count}"):
        list(read_pairs(tmp_path / "x.tsv"))


@pytest.mark.parametrize("sources, targets", [(3, 5), (5, 3), (0, 1), (1, 0)])
def test_different_line_counts_are_both_named(tmp_path, sources, targets):
    (tmp_path / "s").write_text("x\n" * sources)
    (tmp_path / "t").write_text("y\n" * targets)
    with pytest.raises(TextError, match=rf"got {sources} in .*s and {targets} in .*t$"):
        list(read_pairs(tmp_path / "s", tmp_path / "t"))


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert sha256_file(tmp_path / "f") == known
