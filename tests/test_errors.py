"""Mistakes: the exception is of the type that torch.nn raises, and its message names what was expected
and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

# Where the kernels have nothing for a dtype or device, the request goes to torch.nn with a warning first.
pytestmark = pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


@dataclass(frozen=True)
class Mistake:
    """`call(library, name)` goes wrong; every pattern in `says` is found in our message."""

    about: str
    names: tuple[str, ...]
    call: Callable
    says: tuple[str, ...]


def layer(library, name: str, **options) -> torch.nn.Module:
    return getattr(library, name)(4, 7, **options)


def state(name: str, *shape: int, **options):
    """A zero initial state in the form that the module called `name` takes."""
    h = torch.zeros(*shape, **options)
    return (h, h.clone()) if name.startswith("LSTM") else h


def on(*shape: int, hx: tuple[int, ...] | None = None, **state_options) -> Callable:
    """A call on an input of `shape`, with a state of shape `hx`."""

    def call(library, name):
        given = None if hx is None else state(name, *hx, **state_options)
        layer(library, name)(torch.zeros(shape), given)

    return call


def on_packed(features: int = 4, hx: tuple[int, ...] | None = None, dtype=torch.float32) -> Callable:
    def call(library, name):
        packed = pack_padded_sequence(torch.zeros(5, 3, features, dtype=dtype), torch.tensor([5, 4, 2]))
        layer(library, name)(packed, None if hx is None else state(name, *hx))

    return call


def on_dtype(dtype: torch.dtype, *shape: int) -> Callable:
    return lambda library, name: layer(library, name)(torch.zeros(*shape, dtype=dtype))


def built(*args, **options) -> Callable:
    return lambda library, name: getattr(library, name)(*args, **options)


def lstm_state(*tensors: torch.Tensor, x: tuple[int, ...] = (5, 3, 4)) -> Callable:
    """An LSTM or LSTMCell called with a tuple of these tensors as its state."""
    return lambda library, name: layer(library, name)(torch.zeros(x), tensors)


def tensor_for_tuple(*shape: int) -> Callable:
    return lambda library, name: layer(library, name)(
        torch.zeros(5, 3, 4) if name in LAYERS else torch.zeros(3, 4), torch.zeros(shape)
    )


def tuple_for_tensor(*shape: int) -> Callable:
    return lambda library, name: layer(library, name)(
        torch.zeros(5, 3, 4) if name in LAYERS else torch.zeros(3, 4),
        (torch.zeros(shape), torch.zeros(shape)),
    )


def with_projection(library, name) -> None:
    layer(library, name, proj_size=3)(torch.zeros(5, 3, 4), (torch.zeros(1, 3, 7), torch.zeros(1, 3, 7)))


def unknown_nonlinearity_set_later(library, name) -> None:
    cell = layer(library, name)
    cell.nonlinearity = "sigmoid"
    cell(torch.zeros(3, 4))


zeros = torch.zeros
DOUBLE = r"(?i)double|float64"
FLOAT = r"(?i)\bfloat\b|float32"

LAYER_MISTAKES = (
    Mistake("0-D input", LAYERS, on(), ("2D? or 3", "got 0")),
    Mistake("1-D input", LAYERS, on(4), ("2D? or 3", "got 1")),
    Mistake("4-D input", LAYERS, on(2, 5, 3, 4), ("2D? or 3", "got 4")),
    Mistake("input size", LAYERS, on(5, 3, 6), ("4", "6")),
    Mistake("input size, unbatched", LAYERS, on(5, 6), ("4", "6")),
    Mistake("input size, packed", LAYERS, on_packed(6), ("4", "6")),
    Mistake("hx 2-D for a batch", LAYERS, on(5, 3, 4, hx=(1, 7)), ("3-D", "2-D")),
    Mistake("hx 3-D without a batch", LAYERS, on(5, 4, hx=(1, 1, 7)), ("2-D", "3-D")),
    Mistake("hx 4-D", LAYERS, on(5, 3, 4, hx=(1, 1, 3, 7)), ("3-D", "4-D")),
    Mistake("hx batch", LAYERS, on(5, 3, 4, hx=(1, 2, 7)), (r"1, 3, 7", r"1, 2, 7")),
    Mistake("hx size", LAYERS, on(5, 3, 4, hx=(1, 3, 8)), (r"1, 3, 7", r"1, 3, 8")),
    Mistake("hx layers", LAYERS, on(5, 3, 4, hx=(2, 3, 7)), (r"1, 3, 7", r"2, 3, 7")),
    Mistake("hx size, unbatched", LAYERS, on(5, 4, hx=(1, 8)), ("7", "8")),
    Mistake("hx batch, packed", ("RNN", "GRU"), on_packed(hx=(1, 2, 7)), (r"1, 3, 7", r"1, 2, 7")),
    Mistake("hx size, packed", ("RNN", "GRU"), on_packed(hx=(1, 3, 8)), (r"1, 3, 7", r"1, 3, 8")),
    Mistake("hx 2-D, packed", ("RNN", "GRU"), on_packed(hx=(1, 7)), ("1, 3, 7|3-D", "1, 7|2-D")),
    # torch.nn's LSTM does not check these and fails wherever it happens to; the sizes are named all the same.
    Mistake("hx batch, packed", ("LSTM",), on_packed(hx=(1, 2, 7)), ("3", "2")),
    Mistake("hx size, packed", ("LSTM",), on_packed(hx=(1, 3, 8)), ("7", "8")),
    Mistake("hx is a tensor", ("LSTM",), tensor_for_tuple(1, 3, 7), ("tuple|pair", "(?i)tensor")),
    Mistake("hx is a tensor of two rows", ("LSTM",), tensor_for_tuple(2, 3, 7), ("3-D|pair|tuple", "2-D|2, 3, 7")),
    Mistake("hx is a tuple", ("RNN", "GRU"), tuple_for_tensor(1, 3, 7), ("tuple",)),
    Mistake("hx of one tensor", ("LSTM",), lstm_state(zeros(1, 3, 7)), ("tuple|pair", "one|1")),
    Mistake("hx of three tensors", ("LSTM",), lstm_state(*[zeros(1, 3, 7)] * 3), ("two|pair",)),
    Mistake("cx size", ("LSTM",), lstm_state(zeros(1, 3, 7), zeros(1, 3, 8)), ("1, 3, 7", "1, 3, 8")),
    Mistake("cx dimensions", ("LSTM",), lstm_state(zeros(1, 3, 7), zeros(1, 7)), ("3-D", "2-D")),
    Mistake("h0 size with a projection", ("LSTM",), with_projection, ("1, 3, 3", "1, 3, 7")),
    Mistake("float64 input", LAYERS, on_dtype(torch.float64, 5, 3, 4), (DOUBLE, FLOAT)),
    Mistake("bfloat16 input", LAYERS, on_dtype(torch.bfloat16, 5, 3, 4), ("bfloat16", FLOAT)),
    Mistake("integer input", LAYERS, on_dtype(torch.int64, 5, 3, 4), ("int64", FLOAT)),
    Mistake("float64 input, packed", LAYERS, on_packed(dtype=torch.float64), (DOUBLE, FLOAT)),
    Mistake("hx of float64", LAYERS, on(5, 3, 4, hx=(1, 3, 7), dtype=torch.float64), (DOUBLE, FLOAT)),
    Mistake("hx elsewhere", LAYERS, on(5, 3, 4, hx=(1, 3, 7), device="meta"), ("cpu", "meta")),
    Mistake("no steps", LAYERS, on(0, 3, 4), ("larger than 0|at least 1",)),
    Mistake("no steps, unbatched", LAYERS, on(0, 4), ("larger than 0|at least 1",)),
    Mistake("input is a list", LAYERS + CELLS, lambda library, name: layer(library, name)([0.0]), ("list",)),
    Mistake("no input", LAYERS + CELLS, lambda library, name: layer(library, name)(None), ("None",)),
)

CELL_MISTAKES = (
    Mistake("0-D input", CELLS, on(), ("1D? or 2", "got 0")),
    Mistake("3-D input", CELLS, on(2, 3, 4), ("1D? or 2", "got 3")),
    Mistake("input size", CELLS, on(3, 6), ("4", "6")),
    Mistake("input size, unbatched", CELLS, on(6), ("4", "6")),
    Mistake("hx batch", CELLS, on(3, 4, hx=(2, 7)), ("3", "2")),
    Mistake("hx size", CELLS, on(3, 4, hx=(3, 8)), ("7", "8")),
    Mistake("hx size, unbatched", CELLS, on(4, hx=(8,)), ("7", "8")),
    Mistake("hx 1-D for a batch", CELLS, on(3, 4, hx=(7,)), ("3", "7")),
    Mistake("hx 2-D without a batch", CELLS, on(4, hx=(1, 7)), ("7", "1")),
    Mistake("hx 3-D", CELLS, on(3, 4, hx=(1, 3, 7)), ("1D? or 2", "got 3")),
    Mistake("hx is a tensor", ("LSTMCell",), tensor_for_tuple(3, 7), ("tuple|pair", "(?i)tensor")),
    Mistake("hx is a tuple", ("RNNCell", "GRUCell"), tuple_for_tensor(3, 7), ("tuple",)),
    Mistake("hx of one tensor", ("LSTMCell",), lstm_state(zeros(3, 7), x=(3, 4)), ("two|pair",)),
    Mistake("hx of three tensors", ("LSTMCell",), lstm_state(*[zeros(3, 7)] * 3, x=(3, 4)), ("two|pair",)),
    Mistake("cx size", ("LSTMCell",), lstm_state(zeros(3, 7), zeros(3, 8), x=(3, 4)), ("7", "8")),
    Mistake("cx batch", ("LSTMCell",), lstm_state(zeros(3, 7), zeros(2, 7), x=(3, 4)), ("3", "2")),
    Mistake("float64 input", CELLS, on_dtype(torch.float64, 3, 4), (DOUBLE, FLOAT)),
    Mistake("integer input", CELLS, on_dtype(torch.int64, 3, 4), ("(?i)long|int64", FLOAT)),
    Mistake("hx of float64", CELLS, on(3, 4, hx=(3, 7), dtype=torch.float64), (DOUBLE, FLOAT)),
    Mistake("hx elsewhere", CELLS, on(3, 4, hx=(3, 7), device="meta"), ("cpu", "meta")),
    Mistake("unknown nonlinearity", ("RNNCell",), unknown_nonlinearity_set_later, ("sigmoid",)),
)

# The constructors are torch.nn's, and so is what they say.
CONSTRUCTOR_MISTAKES = (
    Mistake("no hidden units", LAYERS, built(4, 0), ("hidden_size",)),
    Mistake("negative hidden_size", LAYERS, built(4, -1), ("hidden_size",)),
    Mistake("fractional hidden_size", LAYERS, built(4, 7.0), ("int", "float")),
    Mistake("hidden_size as text", LAYERS, built(4, "7"), ("int", "str")),
    Mistake("no features", LAYERS, built(0, 7), ("input_size",)),
    Mistake("fractional input_size", LAYERS, built(4.0, 7), ("int", "float")),
    Mistake("dropout of 2", LAYERS, built(4, 7, dropout=2), (r"\[0, 1\]",)),
    Mistake("negative dropout", LAYERS, built(4, 7, dropout=-0.1), (r"\[0, 1\]",)),
    Mistake("dropout of True", LAYERS, built(4, 7, dropout=True), (r"\[0, 1\]",)),
    Mistake("proj_size not below hidden_size", ("LSTM",), built(4, 7, proj_size=7), ("proj_size", "hidden_size")),
    Mistake("negative proj_size", ("LSTM",), built(4, 7, proj_size=-1), ("proj_size",)),
    Mistake("proj_size without an LSTM", ("RNN", "GRU"), built(4, 7, proj_size=3), ("proj_size", "LSTM")),
    Mistake("unknown nonlinearity", ("RNN",), built(4, 7, nonlinearity="sigmoid"), ("tanh", "relu", "sigmoid")),
    Mistake("nonlinearity without an RNN", ("LSTM", "GRU"), built(4, 7, nonlinearity="relu"), ("nonlinearity",)),
    Mistake("no layers", LAYERS, built(4, 7, num_layers=0), ("num_layers",)),
    Mistake("fractional num_layers", LAYERS, built(4, 7, num_layers=1.5), ("float",)),
    Mistake("bias as text", LAYERS, built(4, 7, bias="no"), ("bool", "str")),
    Mistake("unknown option", LAYERS + CELLS, built(4, 7, peephole=True), ("peephole",)),
    Mistake("nothing", LAYERS + CELLS, built(), ("input_size", "hidden_size")),
    Mistake("integer weights", LAYERS + CELLS, built(4, 7, dtype=torch.int64), ("floating point",)),
    Mistake("negative hidden_size", CELLS, built(4, -1), ("-1|-3|-4",)),
    Mistake("fractional hidden_size", CELLS, built(4, 7.0), ("int", "float")),
)

ROWS = [
    pytest.param(mistake, name, id=f"{name}: {mistake.about}")
    for mistake in LAYER_MISTAKES + CELL_MISTAKES + CONSTRUCTOR_MISTAKES
    for name in mistake.names
]


@pytest.mark.parametrize(("mistake", "name"), ROWS)
def test_mistake(mistake, name):
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever torch.nn raises is what we ask for
        mistake.call(torch.nn, name)
    with pytest.raises(theirs.type) as ours:
        mistake.call(fusedrnn, name)
    assert ours.type is theirs.type
    message = str(ours.value)
    for pattern in mistake.says:
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_on_one_layer_warns_as_torch_does(name):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        layer(fusedrnn, name, dropout=0.5)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_a_mistake_leaves_the_module_usable(name):
    module = layer(fusedrnn, name)
    x = torch.zeros(3, 4) if name in CELLS else torch.zeros(5, 3, 4)
    with pytest.raises(RuntimeError):
        module(torch.zeros(*x.shape[:-1], 6))
    module(x)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_a_list_of_two_states_is_as_good_as_a_tuple(name):
    module = layer(fusedrnn, name)
    x, shape = (zeros(3, 4), (3, 7)) if name in CELLS else (zeros(5, 3, 4), (1, 3, 7))
    as_list, as_tuple = module(x, [zeros(shape), zeros(shape)]), module(x, (zeros(shape), zeros(shape)))
    assert torch.equal(as_list[0], as_tuple[0])


def test_a_layer_without_a_bias_that_it_should_have():
    layer = fusedrnn.GRU(4, 7)
    layer.bias_ih_l0 = None
    with pytest.raises(TypeError, match="GRU: expected bias_ih_l0 to be a tensor, got None"):
        layer(torch.randn(2, 3, 4))
