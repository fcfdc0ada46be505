"""Bidirectional LSTMs that look at the source: the recurrent networks of FlowSeq (Ma et al. 2019).

`RecurrentEncoder` and `RecurrentDecoder` take the places of `Encoder` and `Decoder` where whole
sequences are read and written at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.attention import _attend, padding_mask
from pynar.nn.dropout import Dropout
from pynar.nn.transformer import KeysValues, Memory

__all__ = ["BiLSTM", "RecurrentDecoder", "RecurrentEncoder", "look_up"]


class BiLSTM(nn.Module):
    """A bidirectional LSTM over the live steps of a padded batch.

    A direction reads padding, if at all, after the live steps: they come out as those of a packed
    sequence, whose lengths would have to travel to the host.

    Args:
        dim: channels of the input.
        hidden: channels of the states, half of them for each direction.
        layers: of which each reads both directions of the one below.

    Raises:
        ValueError: `hidden` is odd or less than 2.
    """

    def __init__(self, dim: int, hidden: int, layers: int = 1) -> None:
        super().__init__()
        if hidden < 2 or hidden % 2:
            raise ValueError(f"BiLSTM: `hidden` must be even, half for a direction, got {hidden}")
        self.hidden = hidden
        widths = [dim] + (layers - 1) * [hidden]
        self.there = nn.ModuleList(nn.LSTM(w, hidden // 2, batch_first=True) for w in widths)
        self.back = nn.ModuleList(nn.LSTM(w, hidden // 2, batch_first=True) for w in widths)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The states of `x: [B, T, C]`, `[B, T, hidden]`; padding may hold anything, even NaN.

        What comes out there is finite, and nothing else is to be expected of it.
        """
        batch, width, _ = x.shape
        if batch == 0 or width == 0:  # which an LSTM refuses
            return x.new_zeros(batch, width, self.hidden)
        place = torch.arange(width, device=x.device)
        last = lengths[:, None] - 1 - place
        first = width * torch.arange(batch, device=x.device)
        # Live steps from the last to the first, padding where it is: doing so twice undoes it.
        order = (torch.where(last >= 0, last, place) + first[:, None]).flatten()

        def turn(rows: Tensor) -> Tensor:
            return rows.flatten(0, 1).index_select(0, order).view_as(rows)

        x = x.masked_fill((last < 0)[..., None], 0)
        for there, back in zip(self.there, self.back, strict=True):
            x = torch.cat([_run(there, x), turn(_run(back, turn(x)))], -1)
        return x


def _run(lstm: nn.Module, x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return lstm(x)[0]  # type: ignore[no-any-return]
    # Processors that cannot multiply bf16 have no such LSTM.
    with torch.autocast("cpu", enabled=False):
        return lstm(x.to(next(lstm.parameters()).dtype))[0]  # type: ignore[no-any-return]


def look_up(states: Tensor, keys_values: tuple[Tensor, Tensor], lengths: Tensor) -> Tensor:
    """Global attention (Luong et al. 2015): `states: [B * n, T, C]` and what each finds.

    One head whose scores are plain products of a state and a key, as in the released code of
    FlowSeq. A map of the query before them, or of the result before the next linear map, would be
    a product of two matrices with nothing in between.

    Args:
        states: n sequences for each source, one after the other.
        keys_values: of the source, `[B, 1, S, C]` each; padding may hold anything.
        lengths: `[B]`, of the source.

    Returns:
        States and findings side by side, `[B * n, T, 2 C]`.
    """
    mask = padding_mask(lengths, keys_values[0].shape[2])
    # A weight of zero does not silence NaN.
    k, v = (x.masked_fill(~mask.transpose(2, 3), 0) for x in keys_values)
    candidates = len(states) // max(len(lengths), 1)
    q = states.reshape(len(lengths), 1, candidates * states.shape[1], states.shape[2])
    return torch.cat([states, _attend(q, k, v, mask, scale=1.0).view_as(states)], -1)


class RecurrentEncoder(nn.Module):
    """BiLSTM, linear map and ELU, `[B, S, C] -> [B, S, C]`; zero in the padding."""

    def __init__(self, layers: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.lstm = BiLSTM(dim, hidden, layers)
        self.output = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        live = padding_mask(lengths, x.shape[1])[:, 0, 0, :, None]
        return F.elu(self.output(self.lstm(x, lengths))).masked_fill(~live, 0)


class RecurrentDecoder(nn.Module):
    """BiLSTM, global attention to the source, linear map, ELU and dropout."""

    def __init__(self, layers: int, dim: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.lstm = BiLSTM(dim, hidden, layers)
        self.key_value = nn.Linear(dim, 2 * hidden)
        self.output = nn.Linear(2 * hidden, dim)
        self.dropout = Dropout(dropout)

    def project(self, states: Tensor) -> KeysValues:
        """Keys and values of the encoder's `states: [B, S, C]`."""
        k, v = self.key_value(states)[:, None].chunk(2, -1)
        return [(k, v)]

    def remember(self, states: Tensor, embedded: Tensor, lengths: Tensor) -> Memory:
        """As `Decoder.remember`."""
        return Memory(states, embedded, lengths, self.project(states))

    def forward(
        self, x: Tensor, memory: Memory, lengths: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """Decodes `x: [B * n, T, C]` within `lengths: [B * n]`.

        With boolean `wanted: [B * n, T]` only the states of those positions are returned, `[N, C]`.
        """
        h = look_up(self.lstm(x, lengths), memory.keys_values[0], memory.lengths)
        return self.dropout(F.elu(self.output(h if wanted is None else h[wanted])))  # type: ignore[no-any-return]
