"""What is timed: named sets of layer sizes, each with the place its size comes from."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Cell = Literal["RNN", "LSTM", "GRU"]
Lengths = Literal["dense", "packed"]
Mode = Literal["inference", "training"]
MODES: tuple[Mode, ...] = ("inference", "training")

GATES: dict[Cell, int] = {"RNN": 1, "LSTM": 4, "GRU": 3}


@dataclass(frozen=True)
class Case:
    """One recurrent layer stack and the batch it is given: x is (seq, batch, input)."""

    name: str
    cell: Cell
    batch: int
    seq: int
    input: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    lengths: Lengths = "dense"
    dtype: str = "float32"
    source: str = ""
    step: bool = False  # a cell, which takes one step, in place of a layer
    projection: int = 0  # numbers of an LSTM's projected hidden state (proj_size)

    @property
    def state(self) -> int:
        """Numbers of a hidden state."""
        return self.projection or self.hidden

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def id(self) -> str:
        """Readable and unique, e.g. ``doctr-LSTM-B64-T32-I512-H128-L2-bi``."""
        parts = [self.name, self.cell, f"B{self.batch}", f"T{self.seq}", f"I{self.input}", f"H{self.hidden}"]
        if self.projection:
            parts.append(f"P{self.projection}")
        if self.layers > 1:
            parts.append(f"L{self.layers}")
        if self.bidirectional:
            parts.append("bi")
        if self.lengths == "packed":
            parts.append("packed")
        if self.dtype != "float32":
            parts.append(self.dtype)
        if self.step:
            parts.append("cell")
        return "-".join(parts)

    def sequence_lengths(self) -> list[int]:
        """Valid steps of each row: in a packed batch 10-100 % of seq, and seq itself in the first row."""
        if self.lengths == "dense":
            return [self.seq] * self.batch
        draw = random.Random(0)
        shortest = max(1, self.seq // 10)
        return [self.seq] + [draw.randint(shortest, self.seq) for _ in range(self.batch - 1)]

    def flops(self, mode: Mode) -> int:
        """Floating-point operations of the matrix products over the valid steps, 2 per multiply-add."""
        inputs = self.input + (self.layers - 1) * self.directions * self.state
        columns = GATES[self.cell] * (inputs + self.layers * self.state) + self.layers * self.projection
        forward = 2 * sum(self.sequence_lengths()) * self.directions * self.hidden * columns
        # The backward pass has two products per forward product: one for the data, one for the weights.
        return forward if mode == "inference" else 3 * forward


def _both(name: str, batch: int, seq: int, input: int, hidden: int, source: str) -> tuple[Case, Case]:
    return (
        Case(name, "LSTM", batch, seq, input, hidden, source=source),
        Case(name, "GRU", batch, seq, input, hidden, source=source),
    )


_SPREAD = "spread of batch, length and width chosen while the kernels were designed"
_TRIAL_SIZES = (
    (1, 100, 35, 35),
    (1, 200, 64, 64),
    (1, 100, 256, 256),
    (8, 128, 64, 256),
    (16, 50, 128, 128),
    (32, 50, 512, 512),
    (64, 50, 1024, 1024),
    (128, 128, 128, 128),
    (256, 365, 30, 64),
    (1024, 24, 200, 200),
)
TRIAL: tuple[Case, ...] = tuple(case for size in _TRIAL_SIZES for case in _both("trial", *size, _SPREAD))

_STREAM = "one step of a stream, state carried by the caller"
_FEW = "few sequences at once, as in serving and on-policy learning"
SMALL_BATCH: tuple[Case, ...] = (
    *_both("stream", 1, 1, 64, 64, _STREAM),
    *_both("stream", 1, 1, 128, 128, _STREAM),
    *_both("stream", 1, 1, 256, 256, _STREAM),
    *_both("stream", 1, 1, 512, 512, _STREAM),
    *_both("stream", 8, 1, 256, 256, _STREAM),
    Case("stream", "RNN", 1, 1, 128, 128, source=_STREAM),
    *(case for case in TRIAL if case.batch <= 16),
    Case("small", "RNN", 1, 100, 256, 256, source=_FEW),
    Case("small", "RNN", 8, 128, 64, 256, source=_FEW),
    *_both("small", 2, 100, 128, 128, _FEW),
    *_both("small", 4, 50, 128, 512, _FEW),
    Case("small", "LSTM", 8, 128, 64, 256, lengths="packed", source=_FEW),
    Case("small", "GRU", 8, 128, 64, 256, lengths="packed", source=_FEW),
    Case("small", "LSTM", 1, 100, 64, 128, layers=2, bidirectional=True, source=_FEW),
    Case("small", "GRU", 1, 100, 64, 128, layers=2, bidirectional=True, source=_FEW),
)

# fmt: off
MODELS: tuple[Case, ...] = (
    Case("sb3-rollout", "LSTM", 8, 1, 64, 256, source="SB3 RecurrentPPO, 8 environments; input chosen"),
    Case("sb3-update", "LSTM", 1, 128, 64, 256, source="SB3 RecurrentPPO, batch of 128 steps; input chosen"),
    Case("cleanrl-atari", "LSTM", 8, 128, 512, 128, source="CleanRL ppo_atari_lstm, 8 environments"),
    Case("rsl-rl", "LSTM", 4096, 24, 48, 256, source="rsl_rl, Isaac Lab, 4096 environments; input chosen"),
    Case("rsl-rl", "GRU", 4096, 24, 48, 256, source="rsl_rl, Isaac Lab, 4096 environments; input chosen"),
    Case("sample-factory", "GRU", 32, 32, 512, 512, lengths="packed", source="sample-factory, 32 x 32"),
    Case("torchrl", "LSTM", 128, 128, 32, 256, source="TorchRL's recurrent benchmark"),
    Case("torchrl", "GRU", 128, 128, 32, 256, source="TorchRL's recurrent benchmark"),
    Case("pufferlib", "LSTM", 1024, 16, 128, 128, source="PufferLib LSTMWrapper; B chosen"),
    Case("dreamerv3-step", "GRU", 16, 1, 512, 512, source="DreamerV3 RSSM step, 1M model, as a plain GRU"),
    Case("awd-lstm", "LSTM", 40, 70, 1150, 1150, source="AWD-LSTM, the middle layer; B 80 -> 40"),
    Case("tacotron2-encoder", "LSTM", 64, 150, 512, 256, bidirectional=True, lengths="packed",
         source="Tacotron 2 encoder"),
    Case("tacotron2-decoder", "LSTM", 1, 1, 768, 1024, source="Tacotron 2 attention LSTM, one decoder step"),
    Case("kokoro", "LSTM", 1, 200, 640, 256, bidirectional=True, lengths="packed",
         source="Kokoro and StyleTTS 2, one utterance"),
    Case("hdemucs-192", "LSTM", 16, 200, 192, 192, layers=2, bidirectional=True,
         source="Hybrid Demucs DConv, chunks of 200; B chosen"),
    Case("hdemucs-384", "LSTM", 8, 200, 384, 384, layers=2, bidirectional=True,
         source="Hybrid Demucs DConv, chunks of 200; B chosen"),
    Case("denoiser", "LSTM", 4, 300, 768, 768, layers=2, source="facebookresearch/denoiser; T chosen"),
    Case("open-unmix", "LSTM", 16, 260, 512, 256, layers=3, bidirectional=True,
         source="Open-Unmix, 6 s of audio"),
    Case("pyannote", "LSTM", 32, 590, 60, 128, layers=4, bidirectional=True,
         source="pyannote PyanNet, 10 s of audio"),
    Case("tf-gridnet-bands", "LSTM", 500, 65, 192, 192, bidirectional=True,
         source="ESPnet TF-GridNet across 65 bands"),
    Case("tf-gridnet-time", "LSTM", 65, 500, 192, 192, bidirectional=True,
         source="ESPnet TF-GridNet along time, 65 bands"),
    Case("bonito", "LSTM", 64, 100, 768, 768, source="Bonito, one of five layers; T 700 -> 100"),
    Case("rnnt-training", "LSTM", 16, 50, 640, 640, layers=2, source="NeMo Parakeet RNN-T predictor"),
    Case("rnnt-decoding", "LSTM", 1, 1, 640, 640, layers=2, source="NeMo Parakeet RNN-T predictor, one step"),
    Case("rnnoise", "GRU", 16, 250, 384, 384, layers=3, source="RNNoise; B 128 -> 16, T 2000 -> 250"),
    Case("deepfilternet3", "GRU", 16, 300, 256, 256, layers=2, source="DeepFilterNet3, 3 s of audio"),
    Case("deepfilternet3-stream", "GRU", 1, 1, 256, 256, layers=3, source="DeepFilterNet3, one frame"),
    Case("silero-vad", "LSTM", 1, 1, 128, 128, source="Silero VAD, one chunk of a stream"),
    Case("encodec", "LSTM", 8, 75, 512, 512, layers=2, source="EnCodec SEANet, 1 s of audio"),
    Case("doctr-crnn", "LSTM", 64, 32, 512, 128, layers=2, bidirectional=True, source="docTR CRNN"),
    Case("deepar", "LSTM", 32, 100, 20, 40, layers=2, source="GluonTS DeepAR; input chosen"),
    Case("deepar-sampling", "LSTM", 3200, 1, 20, 40, layers=2,
         source="GluonTS DeepAR, 100 samples; input chosen"),
    Case("neuralforecast", "LSTM", 128, 24, 1, 128, layers=2, source="neuralforecast LSTM; T 24-500"),
    Case("neuralforecast", "GRU", 128, 24, 1, 200, layers=2, source="neuralforecast GRU; T 24-500"),
    Case("neuralhydrology", "LSTM", 256, 365, 30, 128, source="NeuralHydrology CudaLSTM, one year of days"),
    Case("neural-amp", "LSTM", 16, 16384, 1, 18, layers=3, source="Neural Amp Modeler; T 40960 -> 16384"),
)
# fmt: on

_TRUNCATED = "truncated back-propagation, sizes chosen"
TRUNCATED: tuple[Case, ...] = (
    Case("a2c", "LSTM", 16, 5, 512, 128, source="OpenAI Baselines A2C, cnn_lstm on Atari, 16 environments"),
    Case("impala", "LSTM", 32, 20, 256, 256, source="Espeholt et al. 2018 (IMPALA), unrolls of 20; I chosen"),
    *_both("truncated", 1, 16, 64, 256, _TRUNCATED),
    *_both("truncated", 2, 5, 64, 128, _TRUNCATED),
    *_both("truncated", 4, 8, 64, 256, _TRUNCATED),
    *_both("truncated", 8, 4, 512, 512, _TRUNCATED),
)

_RNNT = "He et al. 2019, streaming RNN-T"
# fmt: off
PROJECTED: tuple[Case, ...] = (
    Case("rnnt-encoder", "LSTM", 1, 1, 640, 2048, projection=640, source=f"{_RNNT}, an encoder layer, one step"),
    Case("rnnt-encoder", "LSTM", 1, 50, 640, 2048, projection=640, source=f"{_RNNT}, an encoder layer; T chosen"),
    Case("rnnt-encoder", "LSTM", 16, 50, 640, 2048, projection=640, source=f"{_RNNT}, an encoder layer; B, T chosen"),
    Case("rnnt-predictor", "LSTM", 16, 25, 640, 2048, projection=640, layers=2,
         source=f"{_RNNT}, the prediction network; B, T chosen"),
    Case("acoustic", "LSTM", 32, 20, 40, 800, projection=512, layers=2, source="Sak et al. 2014, two layers; B chosen"),
    Case("elmo", "LSTM", 8, 30, 512, 4096, projection=512, bidirectional=True,
         source="Peters et al. 2018 (ELMo), one of two layers; B, T chosen"),
    Case("projected", "LSTM", 1, 100, 128, 256, projection=128, source=_SPREAD),
    Case("projected", "LSTM", 8, 100, 128, 512, projection=128, source=_SPREAD),
    Case("projected", "LSTM", 32, 50, 256, 512, projection=256, source=_SPREAD),
    Case("projected", "LSTM", 128, 128, 64, 128, projection=64, source=_SPREAD),
)
# fmt: on

_DEEPBENCH = "Baidu DeepBench, a selection of its sizes of at most 45 GFLOP forward"
_DEEPBENCH_SIZES: tuple[tuple[Cell, int, int, int], ...] = (
    ("RNN", 32, 1, 672), ("RNN", 64, 1, 96),
    ("RNN", 1760, 16, 50), ("RNN", 1760, 32, 50), ("RNN", 1760, 64, 50),
    ("RNN", 2048, 16, 50), ("RNN", 2048, 32, 50), ("RNN", 2560, 16, 50), ("RNN", 2560, 32, 50),
    ("LSTM", 256, 1, 150), ("LSTM", 256, 4, 150), ("LSTM", 512, 1, 25), ("LSTM", 512, 4, 25),
    ("LSTM", 1024, 1, 25), ("LSTM", 1536, 4, 50), ("LSTM", 2048, 1, 25),
    ("LSTM", 256, 16, 150), ("LSTM", 256, 64, 150), ("LSTM", 512, 16, 25), ("LSTM", 512, 128, 25),
    ("LSTM", 1024, 32, 25), ("LSTM", 1024, 64, 25), ("LSTM", 1536, 8, 50), ("LSTM", 2048, 16, 25),
    ("GRU", 512, 1, 1), ("GRU", 512, 4, 1), ("GRU", 512, 32, 1),
    ("GRU", 1536, 1, 187),
)  # fmt: skip
DEEPBENCH: tuple[Case, ...] = (
    *(Case("deepbench", cell, b, t, h, h, source=_DEEPBENCH) for cell, h, b, t in _DEEPBENCH_SIZES),
    Case("deepbench", "GRU", 1, 375, 1024, 1024, source="Baidu DeepBench; T 1500 -> 375"),
    Case("deepbench", "GRU", 32, 100, 1024, 1024, source="Baidu DeepBench; T 1500 -> 100"),
    Case("deepbench", "GRU", 32, 50, 1536, 1536, source="Baidu DeepBench; T 187 -> 50"),
)

_CELL = "one step of a stream at batch 1, all of its Python included"
_STREAM_SIZES = (48, 64, 128, 192, 256, 512)
STREAMING: tuple[Case, ...] = tuple(
    Case("cell", cell, 1, 1, size, size, source=_CELL, step=True) for cell in GATES for size in _STREAM_SIZES
)

_HALF = "the same sizes in bfloat16, beside fusedrnn's own float32"
_HALF_SIZES = ((1, 1, 512, 512), (1, 1, 1024, 1024), (1, 100, 256, 256), (1, 50, 1024, 1024), (4, 50, 512, 512),
               (8, 128, 64, 256), (32, 50, 512, 512))  # fmt: skip
BFLOAT16: tuple[Case, ...] = tuple(
    Case("bfloat16", cell, *size, dtype="bfloat16", source=_HALF) for size in _HALF_SIZES for cell in ("LSTM", "GRU")
)

_GROWTH = "one size grows, the others stay"
GROWTH: tuple[Case, ...] = (
    *(Case("growth-T", "LSTM", 4, t, 32, 64, source=_GROWTH) for t in (32, 128, 512, 2048, 8192, 32768)),
    *(Case("growth-B", "LSTM", b, 32, 128, 128, source=_GROWTH) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)),
    *(Case("growth-H", "LSTM", 8, 32, h, h, source=_GROWTH) for h in (16, 32, 64, 128, 256, 512, 1024, 2048)),
)

# For GPUs, the most telling first: a run there is often short.
_HEADLINE = "where cuDNN has its persistent kernels, and where torch.nn runs without them"
_HEADLINE_SIZES = ((32, 128, 512, 512), (64, 128, 1024, 1024), (64, 64, 2048, 2048), (32, 256, 128, 128))
GPU_HEADLINE: tuple[Case, ...] = (
    *(case for size in _HEADLINE_SIZES for case in _both("headline", *size, _HEADLINE)),
    Case("headline", "LSTM", 32, 128, 512, 512, layers=2, bidirectional=True, source=_HEADLINE),
    Case("headline", "GRU", 32, 128, 512, 512, layers=2, bidirectional=True, source=_HEADLINE),
    Case("headline", "LSTM", 32, 128, 512, 512, lengths="packed", source=_HEADLINE),
    Case("headline", "GRU", 32, 128, 512, 512, lengths="packed", source=_HEADLINE),
    Case("headline", "RNN", 32, 128, 1024, 1024, source=_HEADLINE),
    *_both("headline", 1, 1, 512, 512, _HEADLINE),
    *_both("headline", 1, 256, 256, 256, _HEADLINE),
)
_FLASHRNN = "the figure in FlashRNN's README: 768 units, sequences of 1024"
GPU_FLASHRNN: tuple[Case, ...] = tuple(
    Case("flashrnn", "LSTM", batch, 1024, 768, 768, source=_FLASHRNN) for batch in (16, 2, 64, 256)
)
_DEEPBENCH_TRAINING = "Baidu DeepBench, its training sizes"
_DEEPBENCH_TRAINING_SIZES: tuple[tuple[Cell, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = (
    ("LSTM", (512, 1024, 2048, 4096), (16, 32, 64, 128), (25,)),
    ("LSTM", (1536,), (8, 16, 32), (50,)),
    ("LSTM", (256,), (16, 32, 64), (150,)),
    ("GRU", (2816, 2048, 1536, 2560), (32,), (187, 375, 750, 1500)),
    ("GRU", (1024,), (32, 64), (1500,)),
    ("GRU", (512,), (32,), (1,)),
    ("RNN", (1760, 2048, 2560), (16, 32, 64, 128), (50,)),
)
GPU_DEEPBENCH: tuple[Case, ...] = tuple(
    Case("deepbench", cell, b, t, h, h, source=_DEEPBENCH_TRAINING)
    for cell, widths, batches, steps in _DEEPBENCH_TRAINING_SIZES
    for t in steps
    for h in widths
    for b in batches
)
GPU_SETS: dict[str, tuple[Case, ...]] = {
    "headline": GPU_HEADLINE,
    "flashrnn": GPU_FLASHRNN,
    "deepbench": GPU_DEEPBENCH,
    "models": MODELS,
}

SETS: dict[str, tuple[Case, ...]] = {
    "small-batch": SMALL_BATCH,
    "models": MODELS,
    "deepbench": DEEPBENCH,
    "trial": TRIAL,
    "streaming": STREAMING,
    "bfloat16": BFLOAT16,
    "growth": GROWTH,
    "projected": PROJECTED,
    "truncated": TRUNCATED,
}

_QUICK_IDS = (
    "stream-LSTM-B1-T1-I128-H128",
    "stream-GRU-B1-T1-I256-H256",
    "small-RNN-B8-T128-I64-H256",
    "small-LSTM-B8-T128-I64-H256-packed",
    "trial-LSTM-B1-T100-I256-H256",
    "trial-GRU-B1-T100-I256-H256",
    "trial-LSTM-B16-T50-I128-H128",
    "trial-GRU-B16-T50-I128-H128",
    "cleanrl-atari-LSTM-B8-T128-I512-H128",
    "doctr-crnn-LSTM-B64-T32-I512-H128-L2-bi",
    "neuralforecast-GRU-B128-T24-I1-H200-L2",
    "deepbench-LSTM-B16-T25-I512-H512",
)


def distinct(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The cases in order, each once: a size may belong to several sets and is timed once."""
    return tuple(dict.fromkeys(cases))


ALL: tuple[Case, ...] = distinct(case for cases in SETS.values() for case in cases)
GRID: tuple[Case, ...] = distinct((*SMALL_BATCH, *MODELS, *DEEPBENCH, *TRIAL))
QUICK: tuple[Case, ...] = tuple(case for case in ALL if case.id in _QUICK_IDS)
