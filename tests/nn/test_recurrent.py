"""Recurrent networks against packed sequences and attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pynar.nn.recurrent import BiLSTM, RecurrentDecoder, RecurrentEncoder, look_up
from pynar.nn.transformer import Memory

DIM, HIDDEN = 5, 6
LENGTHS = torch.tensor([4, 1, 7, 2])
LIVE = torch.arange(7) < LENGTHS[:, None]


def pairs(ours: BiLSTM, theirs: nn.LSTM) -> list[tuple[Tensor, Tensor]]:
    """The weights of both, of PyTorch's bidirectional LSTM as well."""
    found = []
    for stack, suffix in ((ours.there, ""), (ours.back, "_reverse")):
        for layer, one in enumerate(stack):
            for name, weight in one.named_parameters():
                other = getattr(theirs, name.replace("l0", f"l{layer}{suffix}"))
                found.append((weight, other))
    assert len(found) == len(list(theirs.parameters())) == len(list(ours.parameters()))
    return found


@pytest.mark.parametrize("layers", [1, 3])
def test_the_states_and_gradients_of_packed_sequences(layers: int) -> None:
    torch.manual_seed(0)
    ours = BiLSTM(DIM, HIDDEN, layers).double()
    theirs = nn.LSTM(DIM, HIDDEN // 2, layers, batch_first=True, bidirectional=True).double()
    for one, other in pairs(ours, theirs):
        other.data.copy_(one.data)
    x = torch.randn(4, 7, DIM).double()
    weights = torch.randn(4, 7, HIDDEN).double() * LIVE[..., None]
    sequence = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    want, _ = pad_packed_sequence(theirs(sequence)[0], batch_first=True, total_length=7)
    dirty = x.masked_fill(~LIVE[..., None], math.nan)
    found = ours(dirty, LENGTHS)
    assert found.isfinite().all()
    torch.testing.assert_close(found[LIVE], want[LIVE])
    (want * weights).sum().backward()
    (found * weights).sum().backward()  # finite, too, beside NaN
    for one, other in pairs(ours, theirs):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_read(shape: tuple[int, int]) -> None:
    x, lengths = torch.zeros(*shape, DIM), torch.zeros(shape[0], dtype=torch.long)
    assert BiLSTM(DIM, HIDDEN)(x, lengths).shape == (*shape, HIDDEN)
    encoder, decoder = RecurrentEncoder(1, DIM, HIDDEN), RecurrentDecoder(1, DIM, 4, dropout=0.0)
    memory = decoder.remember(encoder(x, lengths), x, lengths)
    assert decoder(x, memory, lengths).shape == (*shape, DIM)


def test_on_the_cpu_autocast_leaves_it_in_fp32() -> None:
    torch.manual_seed(0)
    lstm, x = BiLSTM(DIM, HIDDEN), torch.randn(4, 7, DIM)
    want = lstm(x, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lstm(x, LENGTHS), want)
        assert lstm(x.bfloat16(), LENGTHS).dtype == torch.float32


@pytest.mark.parametrize("hidden", [0, 7])
def test_two_directions_need_an_even_width(hidden: int) -> None:
    with pytest.raises(ValueError, match=rf"BiLSTM: `hidden` must be even.*got {hidden}"):
        BiLSTM(DIM, hidden)


def test_global_attention_by_hand() -> None:
    torch.manual_seed(0)
    states = torch.randn(4, 3, HIDDEN).double()
    k, v = torch.randn(2, 2, 1, 5, HIDDEN).double()
    lengths = torch.tensor([5, 2])
    k[1, :, 2:] = v[1, :, 2:] = math.nan
    found = look_up(states, (k, v), lengths)
    for row in range(4):
        source = row // 2  # two sequences for each
        live = slice(0, int(lengths[source]))
        for step in range(3):
            q = states[row, step]
            weights = torch.stack([q @ key for key in k[source, 0, live]]).exp()
            mean = (weights[:, None] * v[source, 0, live]).sum(0) / weights.sum()
            torch.testing.assert_close(found[row, step], torch.cat([q, mean]))


def make(layers: int) -> tuple[RecurrentEncoder, RecurrentDecoder, Tensor]:
    torch.manual_seed(0)
    encoder = RecurrentEncoder(layers, DIM, HIDDEN).double()
    decoder = RecurrentDecoder(layers, DIM, HIDDEN, dropout=0.0).double()
    return encoder, decoder, torch.randn(4, 7, DIM).double()


def test_the_encoder_and_the_decoder_written_out() -> None:
    encoder, decoder, x = make(2)
    states = encoder(x, LENGTHS)
    want = nn.functional.elu(encoder.output(encoder.lstm(x, LENGTHS)))
    torch.testing.assert_close(states[LIVE], want[LIVE])
    assert not states[~LIVE].any()
    memory = decoder.remember(states, x, LENGTHS)
    found = decoder(x.flip(0), memory, LENGTHS.flip(0))
    h = decoder.lstm(x.flip(0), LENGTHS.flip(0))
    k, v = decoder.key_value(states).chunk(2, -1)
    scores = (h @ k.transpose(1, 2)).masked_fill(~LIVE[:, None], -math.inf)
    want = nn.functional.elu(decoder.output(torch.cat([h, scores.softmax(-1) @ v], -1)))
    torch.testing.assert_close(found, want)
    wanted = LIVE.flip(0)
    chosen = decoder(x.flip(0), memory, LENGTHS.flip(0), wanted)
    torch.testing.assert_close(chosen, found[wanted])


def test_batch_mates_change_nothing() -> None:
    encoder, decoder, x = make(2)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        memory: Memory = decoder.remember(encoder(x, lengths), x, lengths)
        # Two candidates for each source.
        return decoder(x.repeat_interleave(2, 0), memory, lengths.repeat_interleave(2))

    together = run(x, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = run(x[row : row + 1, :length], LENGTHS[row : row + 1])
        for candidate in range(2):
            torch.testing.assert_close(alone[candidate], together[2 * row + candidate, :length])
