"""A stack of layers that is given its input bit by bit and keeps its state."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fusedrnn import _direct, _dispatch, functional
from fusedrnn._checks import as_pair, check_like_input, reset_mask

if TYPE_CHECKING:
    from fusedrnn.modules import GRU, LSTM, RNN

# Reparametrizations that make a weight anew before every forward of the module, which a stream does not call.
_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
_tracing = torch._C._get_tracing_state


class Stream:
    """Inference over a sequence that comes in steps or chunks; made by a layer's ``stream(batch_size)``.

    A call takes a step ``[B, I]`` to its output ``[B, R]``, or a chunk ``[T, B, I]`` to ``[T, B, R]`` (``[B, T, I]`` to
    ``[B, T, R]`` with ``batch_first``), and goes on from the state that the call before left. It computes in the dtype
    of the weights, whatever autocast says, without dropout and without gradients.

    On a CPU the weights are copied once, in the kernels' order: they are those of the moment in which the stream was
    made, or of the last :meth:`refresh`. A step is then one call for all layers, and however a sequence is divided, its
    outputs have the same bits. The layer itself gives these bits too, where a call of several steps packs all its
    weights: up to 191 units from 20 rows × steps on, up to 511 from 64, above from 128.

    One call at a time: threads that share a stream would share its state.

    On other devices weights are read at every call. Nothing waits for the device and the state keeps its place in
    memory, so that a graph may capture a call.
    """

    def __init__(self, module: RNN | LSTM | GRU, batch_size: SupportsIndex, hx: Any = None) -> None:
        self._module, self._name = module, module.mode
        if module.bidirectional:
            raise ValueError(f"{self._name}: expected a stream of a layer with one direction, got a bidirectional one")
        if not isinstance(batch_size, SupportsIndex) or index(batch_size) < 1:
            raise ValueError(f"{self._name}: expected a batch_size of at least 1, got {batch_size!r}")
        batch_size = index(batch_size)
        weight = module._weights()[0]
        self._dtype, self._device = weight.dtype, weight.device
        self._implementation = _dispatch.choose(weight, module.proj_size > 0, True, stacklevel=5)
        kernels = self._implementation == "cpu"
        # The kernels keep float32 between steps whatever comes in and goes out.
        state_dtype = torch.float32 if kernels and weight.dtype in _dispatch.HALF_DTYPES else weight.dtype
        sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
        shapes = [(module.num_layers, batch_size, size) for size in sizes]
        with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside it
            self._states = [torch.zeros(shape, dtype=state_dtype, device=weight.device) for shape in shapes]
        self._step, self._step_out = (batch_size, module.input_size), (batch_size, sizes[0])
        self._kept = None if weight.dtype == torch.float16 else weight.dtype  # what the kernels take as it is
        self._shapes = module._shapes()
        self._stack: Any = None
        if kernels:
            assert _dispatch.extension is not None
            places = [_direct.address(s) for s in self._states]
            if len(places) == 1:
                places.append(0)
            # From the states to the states, and whether x and they are bfloat16.
            self._in_place = (*places, *places, weight.dtype == torch.bfloat16, False)
            self._stack = _dispatch.extension.Stack(
                module.mode.lower(), _direct.STORED.get(weight.dtype, "float32"), batch_size, module.input_size,
                module.hidden_size, module.proj_size, module.num_layers, 1,
            )  # fmt: skip
        self.refresh()
        if hx is not None:
            self.load_state_dict(dict(zip("hc", as_pair(hx, "LSTM") if len(sizes) == 2 else [hx], strict=False)))

    def __reduce__(self) -> Any:
        """A copy, or what pickle keeps: the layer with its weights of now, and the state."""
        return _resumed, (self._module, self._step[0], self.state_dict())

    def refresh(self) -> None:
        """Takes over the layer's weights as they are now; the state stays."""
        module = self._module
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _HOOKS):
                hook(module, ())
        weights = [w.detach() for w in module._weights()]
        if len(weights) != len(self._shapes):
            raise RuntimeError(
                f"{self._name}: expected {len(self._shapes)} weights as when the stream was made, got {len(weights)}"
            )
        for weight, expected in zip(weights, self._shapes, strict=True):
            shape = expected if self._stack else weight.shape
            if weight.shape != shape or weight.dtype != self._dtype or weight.device != self._device:
                raise RuntimeError(
                    f"{self._name}: expected a weight of shape {list(shape)}, {self._dtype} on {self._device} as "
                    f"when the stream was made, got {list(weight.shape)}, {weight.dtype} on {weight.device}"
                )
        if self._stack is not None:
            weights = [_direct.dense(w.float() if w.dtype == torch.float16 else w) for w in weights]
            self._stack.prepare([_direct.address(w) for w in weights])

    def __call__(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """The outputs of a step or a chunk.

        ``resets`` is bool and of x's shape without the last dimension: where set, the state of that row is zeroed
        before that step.

        Raises:
            RuntimeError: ``x`` or ``resets`` of another shape, dtype or device than the stream's.
        """
        if x.shape != self._step or resets is not None or self._stack is None or x.dtype is not self._kept:
            return self._general(x, resets)
        if not x.is_cpu or not x.is_contiguous() or x.is_neg() or _tracing() is not None:
            return self._general(x, resets)
        y = torch.empty(self._step_out, dtype=x.dtype, device="cpu")
        place, to = x.data_ptr(), y.data_ptr()
        if not place or not to:
            return self._general(x, resets)
        self._stack.forward(1, self._step[0], place, to, *self._in_place)
        return y

    def _general(self, x: Tensor, resets: Tensor | None) -> Tensor:
        module, batch = self._module, self._step[0]
        step, batch_first = x.dim() == 2, module.batch_first and x.dim() == 3
        chunk = x.unsqueeze(0) if step else x.transpose(0, 1) if batch_first else x
        if chunk.dim() != 3 or chunk.shape[1:] != self._step:
            steps = f"[{batch}, steps, {self._step[1]}]" if module.batch_first else f"[steps, {batch}, {self._step[1]}]"
            raise RuntimeError(
                f"{self._name}: expected a step of shape {list(self._step)} or a chunk {steps}, got {list(x.shape)}"
            )
        if x.dtype != self._dtype:
            raise RuntimeError(f"{self._name}: expected input of the weights' dtype {self._dtype}, got {x.dtype}")
        check_like_input(self._states[0], "the stream", x, any_dtype=True)
        if resets is not None:
            resets = reset_mask(self._name, resets, x, batch_first)
            resets = resets.transpose(0, 1) if step else resets
        y = self._run(chunk, resets)
        return y.squeeze(0) if step else y.transpose(0, 1) if batch_first else y

    @torch.no_grad()
    def _run(self, x: Tensor, resets: Tensor | None) -> Tensor:
        """``[T, B, I]`` to ``[T, B, R]``."""
        steps, module = x.size(0), self._module
        if self._stack is not None or steps == 0:
            if _tracing() is not None:
                raise RuntimeError(
                    f"{self._name}: expected no torch.jit.trace of a stream, whose call it would not see"
                )
            x = _direct.dense(x if self._kept else x.float())
            y = x.new_empty(steps, *self._step_out)
            if steps:
                resets = None if resets is None else resets.contiguous()
                reset_at = 0 if resets is None else _direct.address(resets)
                self._stack.forward(
                    steps, self._step[0], _direct.address(x), _direct.address(y), *self._in_place, reset_at
                )
            return y.to(self._dtype)
        h, c = self._states if len(self._states) == 2 else (self._states[0], None)
        y, *states = functional.stack(
            module.mode.lower(), x, h, c, module._weights(), self._implementation, module.num_layers, resets=resets
        )
        for kept, new in zip(self._states, states, strict=False):
            assert new is not None
            kept.copy_(new)
        return y

    @torch.no_grad()
    def reset(self, rows: Any = None) -> None:
        """Zeroes the state of some rows, or of all: a bool mask ``[B]``, row numbers, or one.

        Raises:
            RuntimeError: a mask of another shape.
        """
        masked = isinstance(rows, Tensor) and rows.dtype == torch.bool
        if masked and rows.shape != self._step[:1]:
            raise RuntimeError(f"{self._name}: expected a mask of shape [{self._step[0]}], got {list(rows.shape)}")
        for state in self._states:
            if rows is None:
                state.zero_()
            elif masked:
                state.masked_fill_(rows.view(1, -1, 1), 0)  # unlike an index, nothing that a device is waited for
            else:
                state[:, rows] = 0

    @property
    def state(self) -> Any:
        """A copy of the state in the form that the layer takes as ``hx``."""
        copies = [s.to(self._dtype, copy=True) for s in self._states]
        return tuple(copies) if len(copies) == 2 else copies[0]

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state: ``h [L, B, R]``, an LSTM's ``c [L, B, H]``; on a CPU float32 for weights of 16 bits."""
        return {name: s.clone() for name, s in zip("hc", self._states, strict=False)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from a state that :meth:`state_dict` gave, or another of its shapes."""
        names = "hc"[: len(self._states)]
        if sorted(state) != sorted(names):
            raise RuntimeError(
                f"{self._name}: expected a state of {', '.join(names)}, got {', '.join(state) or 'nothing'}"
            )
        for name, kept in zip(names, self._states, strict=True):
            if state[name].shape != kept.shape:
                raise RuntimeError(
                    f"{self._name}: expected {name} of shape {list(kept.shape)}, got {list(state[name].shape)}"
                )
        for name, kept in zip(names, self._states, strict=True):
            kept.copy_(state[name])


def _resumed(module: RNN | LSTM | GRU, batch_size: int, state: dict[str, Tensor]) -> Stream:
    stream = Stream(module, batch_size)
    stream.load_state_dict(state)
    return stream
