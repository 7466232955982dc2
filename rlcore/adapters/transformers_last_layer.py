"""The last decoder layer on the rows that are read: nothing looks at the others once their keys and values are made.

Forward hooks gather the rows in front of every part with matrices that runs after the attention (the attention's output
projection, the MLP or the experts), and put its result back among zeros; so does the projection of the queries. What
lies between (norms, residuals) runs on all rows, of which those that are not read hold numbers without a meaning. The
layer's own result is the rows alone. Gradient checkpointing repeats all but the hook on the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rlcore.adapters import transformers as adapter


class LastLayer:
    """Hooks around a decoder layer, which do nothing unless the forward call names rows. `remove` takes them off.

    parts: the layer's submodules that run on the rows alone, after the attention's hook has seen which.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, parts: list[nn.Module]) -> None:
        self.rows: Tensor | None = None
        self.size = 0
        self._attention = attention
        setattr(attention, adapter.LAST, True)
        self._handles = [
            attention.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.register_forward_hook(self._end, with_kwargs=True),
        ]
        for part in parts:
            self._handles += [part.register_forward_pre_hook(self._gather), part.register_forward_hook(self._scatter)]

    def remove(self) -> None:
        delattr(self._attention, adapter.LAST)
        for handle in self._handles:
            handle.remove()

    # The attention is where the arguments still are when a layer is recomputed; its siblings get none.
    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.rows = kwargs.get(adapter.ROWS)
        self.size = 0 if self.rows is None else kwargs[adapter.TREE].M

    def _gather(self, module: nn.Module, args: Any) -> Any:
        if self.rows is None:
            return None
        return (args[0].squeeze(0).index_select(0, self.rows)[None], *args[1:])

    def _scatter(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.rows is None:
            return None
        x = output[0] if isinstance(output, tuple) else output
        full = x.new_zeros(self.size, x.shape[-1]).index_add_(0, self.rows, x.squeeze(0))[None]
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        # A compiled model would see another attribute in its second call than in its first.
        self.rows, self.size = None, 0
        rows = kwargs.get(adapter.ROWS)
        if rows is None:
            return None
        x = output[0] if isinstance(output, tuple) else output
        read = x.squeeze(0).index_select(0, rows)[None]
        return (read, *output[1:]) if isinstance(output, tuple) else read


def find(body: nn.Module, run: Callable[[], Any]) -> LastLayer:
    """Hooks the layer that attends last while `run` passes a tree through the decoder `body`."""
    with adapter.witnesses() as seen:
        handles = [m.register_forward_pre_hook(lambda m, _: seen.append(m)) for m in body.modules()]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
    # An attention module stands there twice: when it is called, and when it has its queries, keys and values.
    last = max(i for i, m in enumerate(seen) if any(m is before for before in seen[:i]))
    attention, after = seen[last], {id(m) for m in seen[last + 1 :]}
    names = {id(m): name for name, m in body.named_modules()}
    layer = body.get_submodule(names[id(attention)].rpartition(".")[0])
    parts = [m for m in (*attention.children(), *layer.children()) if id(m) in after and _has_matrix(m)]
    queries = getattr(attention, "q_proj", None)
    return LastLayer(layer, attention, [*parts, *([queries] if queries is not None else [])])


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters())
