"""Hugging Face decoders on packed prefix trees, through the attention-interface registry: no model file is patched.

`attach` switches a model to an attention implementation of its own name ("rlcore_sdpa" around "sdpa", and so on). It
looks at one forward keyword argument: with a tree it runs `prefix_attention`, without one it calls the implementation
that the model had, under the mask that the model had. The tree travels as an argument because gradient checkpointing
recomputes layers long after the forward call has returned, and recomputes them with their arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlcore.ops.prefix_attention import prefix_attention
from rlcore.prefix_tree import PrefixTree

PREFIX = "rlcore_"
TREE = "prefix_tree"
ROWS = "prefix_rows"
LAST = "_rlcore_last"  # marks the attention module of a decoder's last layer
# The last layer computes the rows that are read alone, unless they are more than this share of all: there gathering and
# putting back cost as much as they save.
NARROW_UP_TO = 0.9
# What decoders may hand their attention and what changes its result in ways that prefix_attention does not know.
FOREIGN = ("position_bias", "head_mask", "block_mask", "cu_seq_lens_q", "cache")
EXACT_LAYERS = {"full_attention", "sliding_attention", "attention"}

_delegates: dict[tuple[type, str], Callable[..., Any]] = {}
_witness: list[nn.Module] | None = None


class AttachError(ValueError):
    """The model can not run on prefix trees exactly; the message says why. The model is left as it was."""


class Head(NamedTuple):
    """z = logit_scale * (h W^T + b), under a softcap c: c tanh(z / c). weight [V, H], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True)
class Attachment:
    """What the probe found out about a model. Trees deeper than `max_depth` would change its rotary frequencies.

    `logit_scale` is None where there is no vocabulary head. narrows: the last layer can leave out rows.
    """

    softcap: float | None
    logit_scale: float | None
    max_depth: int | None
    narrows: bool


def attach(model: Any) -> Any:
    """Makes a Hugging Face decoder take prefix trees, after a probe that it is exact; returns the model.

    The probe runs a tiny forest in training mode against the model itself, one sequence at a time: logits and
    parameter gradients, with every sliding window narrowed so that it matters. It leaves no gradient, no change of
    mode, and no trace in the random state. Without a tree the model behaves as before. Attaching twice is harmless.
    Of bare decoders and of models with a value or reward head, hidden states are compared in place of logits.
    Raises AttachError with the reason where tree and model differ, or where the design excludes the model (active
    dropout, ALiBi, bidirectional or chunked attention, recurrent layers, MoE auxiliary loss); TypeError for a model
    that is no transformers model.
    """
    from rlcore.adapters import transformers_probe as probe

    inner = unwrap(model)
    # Also where it is attached already: what was added since (an adapter on the head) may exclude it.
    probe.refuse_by_design(inner)
    if getattr(inner, "_rlcore", None) is not None and _is_attached(decoder(inner)):
        return model
    restore = _switch(inner)
    try:
        inner._rlcore = probe.verify(model)
    except BaseException as error:
        restore()
        if isinstance(error, AttachError) or not isinstance(error, Exception):
            raise
        raise AttachError(f"{type(inner).__name__}: the probe failed: {type(error).__name__}: {error}") from error
    return model


def trunk(model: Any, tree: PrefixTree, rows: Literal["loss", "last", "all"] = "loss") -> Tensor:
    """Hidden states of the decoder. Every packed token passes through the model once.

    rows: "loss", at the rows that predict, [N, H], aligned with tree.target (the last row of a prompt is gathered once
    per response); "last", at the last token of every path, [S, H]; "all", of all packed rows, [M, H]. After its keys
    and values the last layer computes only the rows that are asked for.
    Raises ValueError for a model that is not attached, a tree on another device, one deeper than the model's rotary
    embedding allows, and, on a CPU, for ids without an embedding; TypeError for what is no tree.
    """
    inner = unwrap(model)
    state = _attachment(inner)
    if rows not in ("loss", "last", "all"):
        raise ValueError(f'rows: expected "loss", "last" or "all", got {rows!r}')
    _check_tree(tree, inner.get_input_embeddings().weight, state.max_depth)
    if rows == "all":
        return tree_hidden(inner, tree)
    reads = tree.loss_reads if rows == "loss" else tree.last_reads
    narrow = state.narrows and 0 < reads.rows.shape[0] <= NARROW_UP_TO * tree.M
    hidden = tree_hidden(inner, tree, reads.rows if narrow else None)
    # All rows come also where the layer that could leave some out was cut off after `attach`.
    if hidden.shape[0] < tree.M:
        return hidden.index_select(0, reads.at)
    return hidden.index_select(0, tree.loss_rows if rows == "loss" else tree.last_rows)


def _check_tree(tree: PrefixTree, embedding: Tensor, max_depth: int | None) -> None:
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree: expected a PrefixTree, got {type(tree).__name__}")
    if tree.device != embedding.device:
        raise ValueError(
            f"tree: expected the model's device ({embedding.device}), got {tree.device}; use tree.to(device)"
        )
    if max_depth is not None and tree.depth > max_depth:
        raise ValueError(
            f"tree: expected paths of at most {max_depth} tokens, got {tree.depth}: beyond that this model's "
            "rotary frequencies depend on the longest path in the tree"
        )
    if tree.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = (int(x) for x in tree.input_ids.aminmax())
        if least < 0 or most >= embedding.shape[0]:
            raise ValueError(f"tree: expected token ids below {embedding.shape[0]}, got {least} to {most}")


def head(model: Any) -> Head:
    """The attached model's output head: its own weight and bias, and the scale and softcap that the probe measured.

    Raises ValueError for a model that is not attached or has no vocabulary head.
    """
    inner = unwrap(model)
    state = _attachment(inner)
    if state.logit_scale is None:
        raise ValueError(f"model: expected one with a vocabulary head, got {type(inner).__name__}")
    output = inner.get_output_embeddings()
    return Head(output.weight, getattr(output, "bias", None), state.softcap, state.logit_scale)


def tree_hidden(inner: Any, tree: PrefixTree, rows: Tensor | None = None) -> Tensor:
    """The decoder's last hidden states of all packed rows [M, H], or of distinct `rows` [n, H]."""
    output = decoder(inner)(
        input_ids=tree.input_ids[None],
        position_ids=tree.position[None],
        # A mask with four dimensions is passed on untouched, so none of M x M is built; the tree says what it would.
        attention_mask=torch.zeros(1, 1, 1, 1, device=tree.device, dtype=inner.dtype),
        use_cache=False,
        **{TREE: tree, ROWS: rows},
    )
    return output.last_hidden_state.squeeze(0)


def unwrap(model: Any) -> Any:
    """The transformers model inside torch.compile, data-parallel and PEFT wrappers."""
    from transformers import PreTrainedModel

    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    return inner


def decoder(inner: Any) -> Any:
    """The text decoder below the head."""
    found = inner.get_decoder()
    return inner.base_model if found is inner else found


def max_depth(inner: Any) -> int | None:
    """The depth up to which rotary frequencies do not depend on the longest path; None where they never do."""
    limit: int | None = None
    for module in decoder(inner).modules():
        kind = getattr(module, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if kinds & {"dynamic", "longrope"}:
            config = module.config
            rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
            tables = [rope, *(t for t in rope.values() if isinstance(t, dict))]
            origin = [
                t["original_max_position_embeddings"] for t in tables if t.get("original_max_position_embeddings")
            ]
            found = min([*origin, config.max_position_embeddings])
            limit = found if limit is None else min(limit, found)
    return limit


def _attachment(inner: Any) -> Attachment:
    state = getattr(inner, "_rlcore", None)
    if state is None or not _is_attached(decoder(inner)):
        raise ValueError("model: expected a model that went through rlcore.attach(model)")
    return state


def _is_attached(module: nn.Module) -> bool:
    names = [config._attn_implementation for config in configs(module)]
    return all(name is None or name.startswith(PREFIX) for name in names)


def configs(module: nn.Module) -> list[Any]:
    """The distinct configurations that the submodules hold."""
    from transformers import PreTrainedConfig

    found = {id(c): c for m in module.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    return list(found.values())


def _switch(inner: Any) -> Callable[[], None]:
    """Points the decoder's configurations at our implementation; returns what undoes it."""
    body = decoder(inner)
    before = [(config, config._attn_implementation) for config in configs(body)]
    for config, name in before:
        if name is None or name.startswith(PREFIX):
            continue
        _register(name)
        for module in body.modules():
            if isinstance(getattr(module, "config", None), type(config)):
                _delegate(type(module), name)
        # Not `set_attn_implementation`: it reads meaning into the name and may replace it.
        config._attn_implementation_internal = PREFIX + name

    def restore() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    return restore


def _register(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PREFIX + name, _implementation(name))
    masks = AttentionMaskInterface()
    # An implementation without a mask function gets no mask from transformers, and neither does ours around it.
    if name in masks:
        AttentionMaskInterface.register(PREFIX + name, masks[name])


def _delegate(kind: type, name: str) -> Callable[..., Any]:
    """The attention function of this class under `name`: eager attention and overrides belong to the model's file."""
    found = _delegates.get((kind, name))
    if found is None:
        found = _delegates[kind, name] = _find_delegate(kind, name)
    return found


def _find_delegate(kind: type, name: str) -> Callable[..., Any]:
    from transformers import AttentionInterface

    scopes = [vars(sys.modules[base.__module__]) for base in kind.__mro__ if base.__module__ in sys.modules]
    eager: Any = next((s["eager_attention_forward"] for s in scopes if "eager_attention_forward" in s), None)
    functions = next((s["ALL_ATTENTION_FUNCTIONS"] for s in scopes if "ALL_ATTENTION_FUNCTIONS" in s), None)
    return (functions or AttentionInterface()).get_interface(name, eager)


def _implementation(name: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        tree, rows = kwargs.pop(TREE, None), kwargs.pop(ROWS, None)
        if tree is None:
            return _delegate(type(module), name)(module, query, key, value, attention_mask, *args, **kwargs)
        rows = rows if getattr(module, LAST, False) else None
        return _tree_attention(module, query, key, value, tree, rows=rows, **kwargs), None

    return attention


def _tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: PrefixTree,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    rows: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """[1, H, M, D] -> [1, M, Hq, Dv], the conventions of transformers' attention functions."""
    if _witness is not None:
        _witness.append(module)
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise AttachError(f"{type(module).__name__} is bidirectional")
    if dropout:
        raise AttachError(f"{type(module).__name__} has active dropout ({dropout}); set it to 0")
    foreign = [name for name in FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise AttachError(f"{type(module).__name__} uses {', '.join(foreign)}, which a prefix tree does not carry")
    if query.shape[0] != 1:
        raise ValueError(f"prefix_tree: expected one packed tree, input_ids [1, {tree.M}]; got {query.shape[0]} rows")
    # Indexed, not squeezed: that lays out the gradients by head, and a step is faster.
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return prefix_attention(q, k, v, tree, scaling, sliding_window, softcap, s_aux, rows)[None]


@contextmanager
def witnesses() -> Iterator[list[nn.Module]]:
    """Collects the attention modules that were called with a tree inside the block."""
    global _witness
    previous, _witness = _witness, []
    try:
        yield _witness
    finally:
        _witness = previous
