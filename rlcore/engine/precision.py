"""The dtype that a model computes in, the same for the sampler and the trainer.

float32: nothing is done. bfloat16: the forward pass runs under autocast, so that matrix products and attention take
bfloat16 operands, whatever dtype the weights are held in. The head alone gives float32: its operands are rounded to
bfloat16, its logits are not, as in `rl.linear_logprob`. A logit of size 16 in bfloat16 is off by up to 1/16, and the
sampler's log-probs would be off those of the trainer by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlcore.adapters.transformers import unwrap

Method = TypeVar("Method", bound=Callable[..., Any])


class Float32Head(nn.Linear):
    """A head whose logits are float32: under autocast operands of its dtype, products and sums in float32."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(kind)
        bias = None if self.bias is None else self.bias.to(dtype).float()
        with torch.autocast(kind, enabled=False):
            return nn.functional.linear(input.to(dtype).float(), self.weight.to(dtype).float(), bias)


def compute_in_bfloat16(model: Any) -> None:
    """Marks a model so that `numerics` gives it bfloat16, and widens its head."""
    inner = unwrap(model)
    inner._rlcore_bfloat16 = True
    output = inner.get_output_embeddings()
    # The class changes and not the object: tied weights, names of parameters and copies stay as they are. A head of
    # another kind keeps its own forward pass, and its logits are rounded.
    if type(output) is nn.Linear:
        output.__class__ = Float32Head


def numerics(model: Any) -> AbstractContextManager[Any]:
    """The context in which every forward pass of the model runs: autocast to bfloat16, or none.

    Inside one context the weights are cast once, so a loop of forward passes without updates belongs into one.
    """
    inner = unwrap(model)
    if not getattr(inner, "_rlcore_bfloat16", False):
        return nullcontext()
    return torch.autocast(inner.get_input_embeddings().weight.device.type, torch.bfloat16)


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Training mode, in which alone transformers checkpoints, where the model is set to and gradients are wanted.

    Nothing else depends on the mode: dropout is 0. Sampling stays in evaluation mode, because a checkpointed layer has
    no KV cache.
    """
    wanted = torch.is_grad_enabled() and getattr(unwrap(model), "_rlcore_checkpointing", False)
    if wanted:
        model.train()
    try:
        yield
    finally:
        if wanted:
            model.eval()


def forward_pass(method: Method) -> Method:
    """A method of an object with a `.model` that runs it: in the model's dtype, and checkpointed where it is set to."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with numerics(self.model), checkpointing(self.model):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]
