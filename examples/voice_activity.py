"""A voice-activity detector: trained on whole recordings, then fed block by block as a microphone would.

The recordings are made up: noise, and in it stretches of "voice", a wandering pitch with overtones. Frames of 16 ms
become log energies in 16 bands. Streamed, the detector says the same of every frame, bit for bit. Run with:
python examples/voice_activity.py
"""

import argparse

import torch
from torch import Tensor, nn

import fusedrnn

RATE, FRAME, BANDS = 8000, 128, 16


def record(count: int, seconds: float) -> tuple[Tensor, Tensor]:
    """Samples ``[count, time]`` and for every frame whether there is voice in it ``[count, frames]``."""
    frames = int(seconds * RATE) // FRAME
    speaking = torch.zeros(count, frames)
    for row in speaking:
        start = 0
        while start < frames:
            silence, voice = torch.randint(15, 40, (2,)).tolist()
            row[start + silence : start + silence + voice] = 1
            start += silence + voice
    gate = speaking.repeat_interleave(FRAME, 1)
    t = torch.arange(frames * FRAME) / RATE
    pitch = 100 + 120 * torch.rand(count, 1) + 20 * torch.sin(6.28 * 3 * t + 6.28 * torch.rand(count, 1))
    phase = 6.28 * pitch.cumsum(1) / RATE
    voice = sum(torch.sin(k * phase) / k for k in range(1, 9))
    loudness = 0.1 + 0.3 * torch.rand(count, 1)
    return 0.2 * torch.randn(count, frames * FRAME) + loudness * gate * voice, speaking


def features(samples: Tensor) -> Tensor:
    """Log energies ``[count, frames, BANDS]`` of whole frames."""
    spectrum = torch.fft.rfft(samples.unflatten(1, (-1, FRAME)) * torch.hann_window(FRAME)).abs().square()
    return spectrum[..., 1:].unflatten(-1, (BANDS, -1)).mean(-1).add(1e-6).log()


class Detector(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.memory = fusedrnn.GRU(BANDS, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0]).squeeze(-1)


class LiveDetector:
    """Takes blocks of samples of any length and says of every frame that they complete how likely there is voice."""

    def __init__(self, detector: Detector) -> None:
        self.stream, self.head = detector.memory.stream(1), detector.head
        self.rest = torch.zeros(0)

    @torch.no_grad()
    def feed(self, block: Tensor) -> Tensor:
        samples = torch.cat([self.rest, block])
        whole = len(samples) // FRAME * FRAME
        self.rest = samples[whole:]
        if not whole:
            return torch.zeros(0)
        y = self.stream(features(samples[:whole].unsqueeze(0)))
        return self.head(y)[0, :, 0].sigmoid()


def main(updates: int = 60, seed: int = 0) -> float:
    """Trains, streams a new recording, and returns the share of its frames that are judged rightly."""
    torch.manual_seed(seed)
    detector = Detector()
    optimiser = torch.optim.Adam(detector.parameters(), lr=1e-2)
    for update in range(1, updates + 1):
        samples, speaking = record(16, 3.0)
        loss = nn.functional.binary_cross_entropy_with_logits(detector(features(samples)), speaking)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if update % 20 == 0:
            print(f"update {update:3}: loss {loss.item():.3f}")

    samples, speaking = record(1, 10.0)
    live, said, at = LiveDetector(detector), [], 0
    while at < samples.size(1):  # a sound card gives what it has
        block = int(torch.randint(1, 500, ()))
        said.append(live.feed(samples[0, at : at + block]))
        at += block
    states, _ = detector.memory(features(samples))
    again = detector.memory.stream(1)
    same = torch.equal(torch.cat([again(frame) for frame in features(samples).unbind(1)]), states[0])
    right = float(((torch.cat(said) > 0.5) == (speaking[0] > 0.5)).float().mean())
    print(f"streamed: {right:.1%} of the frames judged rightly; frame by frame the same bits: {same}")
    return right if same else 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
