"""The last decoder layer on the rows that are read: nothing looks at the others once their keys and values are made.

Forward hooks gather the rows in front of every part with matrices that runs after the attention (the attention's output
projection, the MLP or the experts), and put its result back among zeros; so does the projection of the queries. What
lies between (norms, residuals) runs on all rows, of which those that are not read hold numbers without a meaning. The
layer's own result is the rows alone. Gradient checkpointing repeats all but the hook on the layer itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rlcore.adapters import transformers as adapter

# The rows and the number of all rows while a last layer runs; None outside, where parts compute what they are given.
# One per thread, because several may run one model at once.
_call = threading.local()


class LastLayer:
    """Hooks around a decoder layer, which do nothing unless the forward call names rows. `remove` takes them off.

    parts: the layer's submodules that run on the rows alone, in the order in which they are called.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, parts: list[nn.Module]) -> None:
        self._attention = attention
        setattr(attention, adapter.LAST, True)
        self._handles = [
            attention.register_forward_pre_hook(_begin, with_kwargs=True),
            attention.register_forward_hook(_clear_after_error, always_call=True),
            layer.register_forward_hook(_end, with_kwargs=True, always_call=True),
        ]
        for part in parts:
            scatter = _scatter_last if part is parts[-1] else _scatter
            self._handles.append(part.register_forward_pre_hook(_gather))
            self._handles.append(part.register_forward_hook(scatter, always_call=True))

    def remove(self) -> None:
        delattr(self._attention, adapter.LAST)
        for handle in self._handles:
            handle.remove()


def _rows() -> Tensor | None:
    return getattr(_call, "rows", None)


# The attention is where the arguments still are when a layer is recomputed; its siblings get none.
def _begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    _call.rows = kwargs.get(adapter.ROWS)
    _call.size = 0 if _call.rows is None else kwargs[adapter.TREE].M


def _clear_after_error(module: nn.Module, args: Any, output: Any) -> None:
    if output is None:
        _call.rows = None


def _gather(module: nn.Module, args: Any) -> Any:
    rows = _rows()
    if rows is None:
        return None
    x = args[0].squeeze(0)
    if x.shape[0] != _call.size:
        raise ValueError(f"model: expected the layers that attach saw; one more got {x.shape[0]} rows of {_call.size}")
    return (x.index_select(0, rows)[None], *args[1:])


def _scatter(module: nn.Module, args: Any, output: Any) -> Any:
    rows = _rows()
    _clear_after_error(module, args, output)
    return None if rows is None or output is None else _scattered(output, rows, _call.size)


def _scatter_last(module: nn.Module, args: Any, output: Any) -> Any:
    rows = _rows()
    # First, because a checkpoint that has recomputed all it needs leaves the layer by an error from in here.
    _call.rows = None
    return None if rows is None or output is None else _scattered(output, rows, _call.size)


def _scattered(output: Any, rows: Tensor, size: int) -> Any:
    x = output[0] if isinstance(output, tuple) else output
    full = x.new_zeros(size, x.shape[-1]).index_add_(0, rows, x.squeeze(0))[None]
    return (full, *output[1:]) if isinstance(output, tuple) else full


def _end(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    _call.rows = None
    rows = kwargs.get(adapter.ROWS)
    if rows is None or output is None:
        return None
    x = output[0] if isinstance(output, tuple) else output
    read = x.squeeze(0).index_select(0, rows)[None]
    return (read, *output[1:]) if isinstance(output, tuple) else read


def find(body: nn.Module, run: Callable[[], Any]) -> LastLayer | None:
    """Hooks the layer that attends last while `run` passes a tree through the decoder `body`.

    None where it has hooks already: a model that shares its decoder was attached before.
    """
    calls: list[tuple[nn.Module, int]] = []
    with adapter.witnesses() as attended:
        handles = [m.register_forward_pre_hook(lambda m, _: calls.append((m, len(attended)))) for m in body.modules()]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
    attention = attended[-1]
    if getattr(attention, adapter.LAST, False):
        return None
    after = [m for m, before in calls if before == len(attended)]
    names = {id(m): name for name, m in body.named_modules()}
    layer = body.get_submodule(names[id(attention)].rpartition(".")[0])
    own = {id(m) for m in (*attention.children(), *layer.children()) if any(p.ndim > 1 for p in m.parameters())}
    queries = getattr(attention, "q_proj", None)
    first = [queries] if queries is not None else []
    return LastLayer(layer, attention, [*first, *dict.fromkeys(m for m in after if id(m) in own)])
