import pytest
from hypothesis import settings
from text_source import parallel_text

from pynar.data import Tokenizer, prepare

# A busy machine is no error.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def text():
    return parallel_text(400)


@pytest.fixture(scope="session")
def tokenizer(text):
    return Tokenizer.train(*text, vocab_size=120)


@pytest.fixture(scope="session")
def tokenizer_directory(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


@pytest.fixture
def write(tmp_path):
    """Writes lines to a file and returns its path."""

    def write_lines(name, lines):
        path = tmp_path / name
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        return path

    return write_lines


@pytest.fixture
def prepared(tmp_path, write, text, tokenizer_directory):
    """A prepared directory with 300 training and 100 validation pairs."""
    output = tmp_path / "corpus"
    prepare(
        output,
        train=(write("train.s", text[0][:300]), write("train.t", text[1][:300])),
        valid=(write("valid.s", text[0][300:]), write("valid.t", text[1][300:])),
        tokenizer=tokenizer_directory,
    )
    return output
