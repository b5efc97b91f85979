"""Drop-in RNN, LSTM and GRU layers for PyTorch with fused forward and backward kernels."""

from importlib.metadata import PackageNotFoundError, version

from fusedrnn import _graphs as _graphs  # which makes the operators differentiable
from fusedrnn._convert import convert, revert
from fusedrnn._dispatch import Explanation, FallbackWarning
from fusedrnn._explain import explain
from fusedrnn._prepack import prepack
from fusedrnn._stream import Stream
from fusedrnn.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.modules import GRU, LSTM, RNN

try:
    __version__ = version("fusedrnn")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Explanation",
    "FallbackWarning",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "convert",
    "explain",
    "prepack",
    "revert",
]
