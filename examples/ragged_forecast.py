"""A forecaster on series of many lengths: one padded batch, lengths instead of packing.

Each series is a wave of its own period, height and level with some noise, 10 to 80 values long. The model says the next
value at every step; at the end it is compared with saying the last value again. Run with:
python examples/ragged_forecast.py
"""

import argparse

import torch
from torch import Tensor, nn

import fusedrnn

LONGEST = 80


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Series ``[count, LONGEST + 1]``, of which row b has ``lengths[b] + 1`` values; the padding is NaN."""
    lengths = torch.randint(10, LONGEST + 1, (count,))
    t = torch.arange(LONGEST + 1.0)
    period, phase = torch.rand(count, 1) * 12 + 6, torch.rand(count, 1) * 6.28
    values = torch.rand(count, 1) + (0.5 + torch.rand(count, 1)) * torch.sin(6.28 * t / period + phase)
    values = values + 0.05 * torch.randn_like(values)
    return values.masked_fill(t > lengths.unsqueeze(1), float("nan")), lengths


class Forecaster(nn.Module):
    """The next value at every step, and after each series' last step."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.encoder = fusedrnn.GRU(1, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, h_n = self.encoder(values.unsqueeze(-1), lengths=lengths)
        return self.head(y).squeeze(-1), self.head(h_n[-1]).squeeze(-1)


def main(updates: int = 200, seed: int = 0) -> float:
    """Trains; returns the error of the forecasts after the last step, as a share of the last value's own."""
    torch.manual_seed(seed)
    model = Forecaster()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for update in range(1, updates + 1):
        values, lengths = draw(64)
        said, _ = model(values[:, :-1], lengths)
        valid = torch.arange(LONGEST) < lengths.unsqueeze(1)
        loss = (said - values[:, 1:])[valid].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if update % 50 == 0:
            print(f"update {update:3}: mean squared error {loss.item():.4f}")
    values, lengths = draw(500)
    truth, last = (values.gather(1, (lengths - back).unsqueeze(1)).squeeze(1) for back in (0, 1))
    with torch.no_grad():
        _, said = model(values[:, :-1], lengths)
    ours, naive = (float((guess - truth).square().mean()) for guess in (said, last))
    print(f"next value of 500 new series: mean squared error {ours:.4f}, of the last value {naive:.4f}")
    return ours / naive


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
