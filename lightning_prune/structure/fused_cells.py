"""Takes the fused cells of recurrent layers, which run on GPUs, apart into operators that have rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CellsInSteps(TorchDispatchMode):
    """Runs fused LSTM and GRU cells as the operators that they stand for, which modes outside this one see."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # never compiled; else torch wraps each call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        steps = _CELLS.get(func.overloadpacket)
        if steps is None:
            return func(*args, **(kwargs or {}))
        return steps(*args)


def _lstm_cell(
    from_input: Tensor,
    from_hidden: Tensor,
    cell_state: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next hidden state, the next cell state and the gates, which a backward pass of the cell reads.

    Args:
        from_input: The input times its weights, ``(N, 4 H)``: input gate, forget gate, cell, output gate.
        from_hidden: The hidden state times its weights, ``(N, 4 H)``.
        cell_state: Cell state, ``(N, H)``.
        input_bias: Bias of the input, ``(4 H,)``, or None.
        hidden_bias: Bias of the hidden state, ``(4 H,)``; given where the other is.
    """
    gates = _biased(from_input, input_bias) + _biased(from_hidden, hidden_bias)
    entering, forgetting, new, leaving = gates.chunk(4, 1)
    entering, forgetting, new, leaving = entering.sigmoid(), forgetting.sigmoid(), new.tanh(), leaving.sigmoid()
    next_cell = forgetting * cell_state + entering * new
    return leaving * next_cell.tanh(), next_cell, torch.cat((entering, forgetting, new, leaving), 1)


def _gru_cell(
    from_input: Tensor,
    from_hidden: Tensor,
    hidden_state: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the next hidden state, and what a backward pass of the cell reads, ``(N, 5 H)``.

    Args:
        from_input: The input times its weights, ``(N, 3 H)``: reset gate, update gate, new state.
        from_hidden: The hidden state times its weights, ``(N, 3 H)``.
        hidden_state: Hidden state, ``(N, H)``.
        input_bias: Bias of the input, ``(3 H,)``, or None.
        hidden_bias: Bias of the hidden state, ``(3 H,)``; given where the other is.
    """
    reset_in, update_in, new_in = _biased(from_input, input_bias).chunk(3, 1)
    reset_hidden, update_hidden, new_hidden = _biased(from_hidden, hidden_bias).chunk(3, 1)
    reset = (reset_in + reset_hidden).sigmoid()
    update = (update_in + update_hidden).sigmoid()
    new = (new_in + reset * new_hidden).tanh()
    workspace = torch.cat((reset, update, new, hidden_state, new_hidden), 1)
    return (hidden_state - new) * update + new, workspace


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


_CELLS: dict[Any, Any] = {
    torch.ops.aten._thnn_fused_lstm_cell: _lstm_cell,
    torch.ops.aten._thnn_fused_gru_cell: _gru_cell,
}
