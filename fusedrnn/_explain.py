"""What would run a call, and how, in words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _autocast, _dispatch, _prepack, cells, modules
from fusedrnn._dispatch import Explanation


def explain(
    module: torch.nn.Module,
    input: Tensor | PackedSequence,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Explanation:
    """Say which implementation would run ``module(input)``, and why not a faster one; nothing is run.

    Args:
        module: a fusedrnn layer or cell. For one of torch.nn's the answer is ``torch``, with the advice to convert it.
        input: what it would be called with, as ``lengths`` and ``resets``.

    Raises:
        TypeError: ``module`` is no recurrent layer or cell.
    """
    if isinstance(module, modules.FUSED):
        data = input.data if isinstance(input, PackedSequence) else input
        autocast = _autocast.dtype(data)
        dtype = autocast or data.dtype
        if (
            autocast
            and data.is_cpu
            and not isinstance(input, PackedSequence)
            and _call(module, input)[1] == 1
            and next(module.parameters()).dtype == torch.float32
        ):
            dtype = torch.float32  # it leaves these weights as they are
        found = _dispatch.implementation_for(data.device, dtype, bool(getattr(module, "proj_size", 0)))
        if lengths is not None or resets is not None:
            found = _dispatch.instead_of_torch(found)
        if found.implementation not in ("cpu", "cuda"):
            return found
        path = (
            _path(module, input, dtype) if found.implementation == "cpu" else _cuda_path(module, input, dtype, lengths)
        )
        return found._replace(reason=f"{found.reason}; {path}")
    if isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase):
        return Explanation(
            "torch",
            f"{type(module).__name__} is not one of fusedrnn's modules; fusedrnn.convert swaps torch.nn's",
        )
    raise TypeError(f"expected a recurrent layer or cell, got {type(module).__name__}")


def _call(module: torch.nn.Module, input: Tensor | PackedSequence) -> tuple[str, int, int, int]:
    """The first layer's cell, steps, batch and directions."""
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(module, cells._Cell):
        mode, steps, batch, directions = module._mode(), 1, data.shape[0] if data.dim() == 2 else 1, 1
    else:
        assert isinstance(module, torch.nn.RNNBase)
        mode, directions = module.mode.lower(), 2 if module.bidirectional else 1
        if isinstance(input, PackedSequence):
            steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        elif data.dim() == 2:
            steps, batch = data.shape[0], 1
        elif data.dim() != 3:
            raise ValueError(f"{module.mode}: expected input of 2 or 3 dimensions, got {data.dim()}")
        else:
            steps, batch = data.shape[:2] if not module.batch_first else data.shape[1::-1]
    return "rnn_tanh" if mode.startswith("rnn") else mode, steps, batch, directions  # relu's plan is the same


def _cuda_path(
    module: torch.nn.Module, input: Tensor | PackedSequence, dtype: torch.dtype, lengths: Tensor | None
) -> str:
    """How the GPU's kernels would run the first layer, in words."""
    cuda_extension = _dispatch.cuda_extension
    assert cuda_extension is not None
    data = input.data if isinstance(input, PackedSequence) else input
    cell, steps, batch, directions = _call(module, input)
    name = str(dtype).removeprefix("torch.")
    hidden: int = module.hidden_size  # type: ignore[assignment]
    tf32 = name == "float32" and _dispatch.use_tf32(data)
    device = _dispatch.index_of(data.device)
    call = (cell, name, steps, batch, hidden, directions, lengths is not None, device, tf32)
    schedule, backward = (cuda_extension.schedule(*call, backward) for backward in (False, True))
    other = f"; backward by the {backward} schedule" if backward != schedule else ""
    if schedule == "step":
        reason = "float64" if name == "float64" else "few steps, a large batch or a large layer"
        return f"step schedule: a product and a kernel per time step ({reason}){other}"
    if schedule == "lone":
        return f"one kernel for the lone step, products included{other}"
    where = {
        "block": "shared memory",
        "cluster": "the registers of a cluster of thread blocks",
        "grid": "the registers of the whole GPU",
    }[schedule]
    return f"{schedule} schedule: all steps in one kernel, the recurrent weights in {where}{other}"


def _path(module: torch.nn.Module, input: Tensor | PackedSequence, dtype: torch.dtype) -> str:
    """How the CPU's kernels would run the first layer forward, in words."""
    extension = _dispatch.extension
    assert extension is not None
    cell, steps, batch, directions = _call(module, input)
    name = str(dtype).removeprefix("torch.")
    data = input.data if isinstance(input, PackedSequence) else input
    kept = _autocast.keeps_state(module, isinstance(input, PackedSequence))
    wide = kept and data.dtype == torch.float32  # what autocast leaves so
    plan = extension.plan(
        cell, name, False, steps, batch, module.input_size, module.hidden_size, directions, narrow=not wide,
        projection=getattr(module, "proj_size", 0),
        batch_sizes=[n for n in input.batch_sizes.tolist() if n] if isinstance(input, PackedSequence) else [],
    )  # fmt: skip
    layout = "weights packed into tiles" if plan["tiled"] else "packed weights"
    weights = layout if plan["packed"] else "weights read in place"
    if _prepack.serves(module, steps == 1):
        weights = "weights packed once"
    threads = plan["teams"] * plan["members"]
    if threads == 1:
        sharing = "1 thread"
    elif plan["row_blocks"] > 1:
        sharing = f"{threads} threads share the rows" + (" and the units" if plan["members"] > 1 else "")
    elif plan["members"] == 1:
        sharing = f"{threads} threads share the directions"
    else:
        sharing = f"{threads} threads share the units"
    return f"{extension.instruction_set()}, {weights}, {sharing}"
