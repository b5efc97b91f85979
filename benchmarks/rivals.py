"""What fusedrnn is measured against: torch.nn, and onnxruntime in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.shapes import Case
from fusedrnn._bench import State, interleaved_medians, random_state, tensors

# Positions of ONNX's gates in torch's order: LSTM i o f g from i f g o, GRU z r n from r z n.
ONNX_GATES = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


@dataclass(frozen=True)
class Workload:
    """A torch.nn module and its input.

    Of a layer, ``padded`` is (seq, batch, input) and ``x`` is the same batch as the case gives it, packed or not;
    ``hx`` is (layers * directions, batch, hidden), a pair for an LSTM. All of them require gradients. A cell has
    x (batch, input) and hx (batch, hidden), which do not.
    """

    module: torch.nn.RNNBase | torch.nn.RNNCellBase
    x: Tensor | PackedSequence
    padded: Tensor
    hx: State


def projected(case: Case) -> dict[str, int]:
    """What only an LSTM's constructor takes."""
    return {"proj_size": case.projection} if case.projection else {}


def torch_workload(case: Case) -> Workload:
    """The case with torch.nn: random weights, input and state, the same at every call."""
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)
    if case.step:
        cell: torch.nn.RNNCellBase = getattr(torch.nn, case.cell + "Cell")(case.input, case.hidden, dtype=dtype)
        one = torch.randn(case.batch, case.input, dtype=dtype)
        h, c = torch.randn(2, case.batch, case.hidden, dtype=dtype).unbind()
        return Workload(cell, one, one, (h.clone(), c.clone()) if case.cell == "LSTM" else h.clone())
    module: torch.nn.RNNBase = getattr(torch.nn, case.cell)(
        case.input, case.hidden, case.layers, bidirectional=case.bidirectional, dtype=dtype, **projected(case)
    )
    padded = torch.randn(case.seq, case.batch, case.input, dtype=dtype, requires_grad=True)
    x: Tensor | PackedSequence = padded
    if case.lengths == "packed":
        lengths = torch.tensor(case.sequence_lengths())
        packed = pack_padded_sequence(padded.detach(), lengths, enforce_sorted=False)
        x = packed._replace(data=packed.data.requires_grad_())
    return Workload(module, x, padded, random_state(module, case.batch))


def _onnx_weights(module: torch.nn.RNNBase, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ONNX's W (directions, gates * hidden, input), R (.., hidden) and B (directions, 2 * gates * hidden)."""

    def stacked(name: str) -> np.ndarray:
        suffixes = ("", "_reverse") if module.bidirectional else ("",)
        gates = ONNX_GATES[module.mode.split("_")[0]]
        parts = [getattr(module, f"{name}_l{layer}{suffix}").detach() for suffix in suffixes]
        return np.stack([torch.cat([part.chunk(len(gates))[g] for g in gates]).numpy() for part in parts])

    biases = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
    return stacked("weight_ih"), stacked("weight_hh"), biases


def onnx_model(case: Case, module: torch.nn.RNNBase) -> bytes:
    """An ONNX model with the module's weights, one LSTM, GRU or RNN node per layer.

    Inputs: x (seq, batch, input) and a state (directions, batch, hidden) per layer, h_0, h_1, .. and for an
    LSTM c_0, c_1, .. Outputs: y (seq, batch, directions * hidden) and the final states in torch's layout.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    states = ("h", "c") if case.cell == "LSTM" else ("h",)
    state_shape = [case.directions, case.batch, case.hidden]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.seq, case.batch, case.input])]
    y_shape = [case.seq, case.batch, case.directions * case.hidden]
    constants = {"y_shape": np.array(y_shape)}
    lengths = ""
    if case.lengths == "packed":
        lengths = "lengths"
        constants[lengths] = np.array(case.sequence_lengths(), dtype=np.int32)
    attributes: dict[str, Any] = {"hidden_size": case.hidden}
    attributes["direction"] = "bidirectional" if case.bidirectional else "forward"
    if case.cell == "GRU":
        attributes["linear_before_reset"] = 1

    nodes = []
    for layer in range(case.layers):
        weights = [f"{name}_{layer}" for name in "WRB"]
        constants |= dict(zip(weights, _onnx_weights(module, layer), strict=True))
        initial = [f"{state}_{layer}" for state in states]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, state_shape) for name in initial]
        source = "x" if layer == 0 else f"y_{layer - 1}"
        target = "y" if layer == case.layers - 1 else f"y_{layer}"
        final = [f"{state}_n_{layer}" for state in states]
        nodes += [
            helper.make_node(case.cell, [source, *weights, lengths, *initial], [f"Y_{layer}", *final], **attributes),
            # Y is (seq, directions, batch, hidden).
            helper.make_node("Transpose", [f"Y_{layer}"], [f"Yt_{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"Yt_{layer}", "y_shape"], [target]),
        ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)]
    final_shape = [case.layers * case.directions, case.batch, case.hidden]
    for state in states:
        layers = [f"{state}_n_{layer}" for layer in range(case.layers)]
        nodes.append(helper.make_node("Concat", layers, [f"{state}_n"], axis=0))
        outputs.append(helper.make_tensor_value_info(f"{state}_n", TensorProto.FLOAT, final_shape))

    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, case.id, inputs, outputs, initializers)
    # An operator set and format that every onnxruntime of the last years reads.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    return bytes(model.SerializeToString())


def onnx_feeds(case: Case, workload: Workload) -> dict[str, np.ndarray]:
    """The workload's input and initial state under the names of ``onnx_model``."""
    feeds = {"x": workload.padded.detach().numpy()}
    for name, state in zip("hc", tensors(workload.hx), strict=False):
        layers = np.split(state.detach().numpy(), case.layers)
        feeds |= {f"{name}_{layer}": part for layer, part in enumerate(layers)}
    return feeds


def torch_outputs(workload: Workload) -> list[np.ndarray]:
    """y, padded with zeros, and the final states of the torch.nn module."""
    with torch.inference_mode():
        y, state = workload.module(workload.x, workload.hx)
    if isinstance(y, PackedSequence):
        y, _ = pad_packed_sequence(y)
    return [tensor.numpy() for tensor in tensors((y, state))]


def onnx_session(case: Case, workload: Workload, threads: int) -> Any:
    """An onnxruntime session for the workload, whose outputs were found to equal torch's."""
    import onnxruntime  # type: ignore[import-untyped]

    assert isinstance(workload.module, torch.nn.RNNBase)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        onnx_model(case, workload.module), options, providers=["CPUExecutionProvider"]
    )
    outputs = session.run(None, onnx_feeds(case, workload))
    for ours, theirs in zip(outputs, torch_outputs(workload), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    return session


class OnnxRuntime:
    """onnxruntime's inference times, from a process of its own: its spinning threads slow their neighbours.

    The process waits for a case, times it and frees the session with its threads before it answers, so that
    it is idle whenever the caller times something else.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.rivals"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def missing() -> list[str]:
        """The packages it needs and does not find."""
        return [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]

    def median_seconds(self, case: Case, seconds: float) -> float:
        """Median seconds of one run of the case, timed for ``seconds``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"case": asdict(case), "seconds": seconds, "threads": self._threads}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the onnxruntime process ended at {case.id}")
        return float(json.loads(answer))

    def __enter__(self) -> "OnnxRuntime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def _answer(request: dict[str, Any]) -> float:
    case = replace(Case(**request["case"]), step=False)  # onnxruntime has layers only
    torch.set_num_threads(request["threads"])
    workload = torch_workload(case)
    session = onnx_session(case, workload, request["threads"])
    feeds = onnx_feeds(case, workload)
    (seconds,) = interleaved_medians([lambda: session.run(None, feeds)], request["seconds"])
    return seconds


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
