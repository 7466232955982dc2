"""The probe behind `attach`: is a decoder on a prefix tree, with its head, the same function as the decoder itself?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlcore.adapters import transformers as adapter
from rlcore.adapters import transformers_last_layer as last_layer
from rlcore.adapters.transformers import AttachError, Attachment, Head
from rlcore.prefix_tree import PrefixTree

WINDOW = 3
WINDOW_NAMES = ("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size")
# Above this many parameters half-precision weights are probed as they are, and gradients on the smallest parameters.
UPCAST_LIMIT = 1_000_000_000
GRADIENT_LIMIT = 100_000_000


def refuse_by_design(inner: Any) -> None:
    """Raises AttachError for what a tiny probe could miss or could not name."""
    name, body = type(inner).__name__, adapter.decoder(inner)
    config = body.config
    if any(p.device.type == "meta" for p in inner.parameters()):
        raise AttachError(f"{name}: its weights are not loaded (device meta)")
    if getattr(config, "is_encoder_decoder", False):
        raise AttachError(f"{name}: encoder-decoder models have no single packed sequence")
    if getattr(config, "is_causal", True) is False:
        raise AttachError(f"{name}: the attention is bidirectional (config.is_causal is False)")
    if getattr(config, "alibi", False) or any("alibi" in attribute for attribute in dir(type(body))):
        raise AttachError(f"{name}: ALiBi adds a bias by packed distance, which is not depth in a tree")
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - adapter.EXACT_LAYERS)
    if kinds:
        raise AttachError(
            f"{name}: layers of type {', '.join(kinds)} (recurrent, linear or chunked) can not follow a tree"
        )
    if getattr(config, "output_router_logits", False):
        raise AttachError(
            f"{name}: the MoE auxiliary loss would count a shared token once instead of once per path; "
            "set config.output_router_logits to False"
        )
    output = inner.get_output_embeddings()
    if output is None and not inner.can_generate():
        return  # a bare decoder, or one with a value or reward head, which is the caller's to apply
    if not isinstance(getattr(output, "weight", None), Tensor) or output.weight.ndim != 2:
        raise AttachError(f"{name}: no output head with a weight [vocabulary, hidden] found")
    if hasattr(output, "base_layer"):
        raise AttachError(f"{name}: the output head has an adapter, which the head's weight alone does not show")


def verify(model: Any) -> Attachment:
    """Fits the head, where there is one, then compares tree and single sequences. AttachError where they differ."""
    inner = adapter.unwrap(model)
    name, output = type(inner).__name__, inner.get_output_embeddings()
    with _undisturbed(model) as exact:
        head = None
        if output is not None:
            fitted = _fit_head(model, inner, name, 1e-4 if exact else 1e-2)
            head = Head(output.weight, getattr(output, "bias", None), *fitted)
        reason = ""
        # A second try, because a mixture-of-experts router may sit on a tie in the first.
        for seed in (0, 1):
            case = _case(model, inner, head, seed, exact)
            reason = _difference(model, inner, head, case, exact)
            if not reason:
                softcap, scale = (head.softcap, head.logit_scale) if head else (None, None)
                narrows = _narrows(model, inner, head, case, exact)
                return Attachment(softcap, scale, adapter.max_depth(inner), narrows)
    raise AttachError(f"{name}: {reason}")


@contextmanager
def _undisturbed(model: Any) -> Iterator[bool]:
    """Everything the probe may touch is put back: modes, buffers, weights' dtype, windows, random state, precision.

    Yields whether the numbers inside are at least float32.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    weights = [(p, p.data) for p in model.parameters()]
    device = next(model.parameters()).device
    precision = torch.get_float32_matmul_precision()
    half = (torch.bfloat16, torch.float16)
    upcast = sum(p.numel() for p, _ in weights) <= UPCAST_LIMIT
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_narrow_windows(model))
        stack.enter_context(_without_reentrant_checkpoints(model))
        try:
            torch.set_float32_matmul_precision("highest")
            if upcast:
                for p, data in weights:
                    if data.dtype in half:
                        p.data = data.float()
                for m, n, b, _ in buffers:
                    if b.dtype in half:
                        m._buffers[n] = b.float()
            yield upcast or not any(data.dtype in half for _, data in weights)
        finally:
            torch.set_float32_matmul_precision(precision)
            for p, data in weights:
                p.data = data
            with torch.no_grad():
                for m, n, b, value in buffers:
                    m._buffers[n] = b.copy_(value)
            for m, mode in modes:
                m.training = mode


@contextmanager
def _narrow_windows(model: Any) -> Iterator[None]:
    """Sets windows and chunks, in configurations and modules alike, to a size that tiny sequences exceed."""
    holders = [*adapter.configs(model), *model.modules()]
    before = []
    try:
        for holder in holders:
            for name in WINDOW_NAMES:
                value = getattr(holder, name, None) if name in vars(holder) else None
                if type(value) is int and value > WINDOW:
                    before.append((holder, name, value))
                    setattr(holder, name, WINDOW)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


@contextmanager
def _without_reentrant_checkpoints(model: Any) -> Iterator[None]:
    """Reentrant checkpoints only know `.backward()`, which would leave gradients; the other kind is probed as it is."""
    reentrant = [
        m
        for m in model.modules()
        if getattr(m, "gradient_checkpointing", False)
        and getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
    ]
    try:
        for m in reentrant:
            m.gradient_checkpointing = False
        yield
    finally:
        for m in reentrant:
            m.gradient_checkpointing = True


def _set_training(model: Any, mode: bool) -> None:
    for module in model.modules():
        module.training = mode


def _fit_head(model: Any, inner: Any, name: str, tolerance: float) -> tuple[float | None, float]:
    """(softcap, logit_scale) measured on the model itself, by putting chosen hidden states in front of its head."""
    output = inner.get_output_embeddings()
    weight, bias = output.weight.detach(), getattr(output, "bias", None)
    generator = torch.Generator().manual_seed(0)
    unit = torch.randn(4, weight.shape[1], generator=generator).to(weight)
    unit = unit / (unit @ weight.T).float().square().mean().sqrt().clamp_min(1e-30)

    def raw(x: Tensor) -> Tensor:
        z = x @ weight.T
        return (z if bias is None else z + bias.detach()).double()

    def logits(x: Tensor) -> Tensor:
        def replace(module: nn.Module, args: Any, result: Any) -> Any:
            result.last_hidden_state = x[None].to(result.last_hidden_state.dtype)
            return result

        handle = adapter.decoder(inner).register_forward_hook(replace)
        try:
            ids = torch.zeros(1, len(x), dtype=torch.long, device=weight.device)
            with torch.no_grad():
                return model(input_ids=ids, use_cache=False).logits[0].double()
        finally:
            handle.remove()

    _set_training(model, False)
    softcap = None
    far, farther = (logits(unit * factor).abs().max().item() for factor in (1e4, 1e6))
    if farther < 10 * far:
        softcap = _snapped(farther, inner, tolerance)
    size = 1.0
    z = logits(unit)
    while softcap is not None and z.abs().max() < softcap / 10 and size < 1e6:
        size *= 4  # a small logit scale needs larger states before the cap shows
        z = logits(unit * size)
    base = raw(unit * size)
    if softcap is not None:
        near = z.abs() < 0.8 * softcap
        base, z = base[near], softcap * torch.atanh(z[near] / softcap)
    scale = _snapped(float((z * base).sum() / base.square().sum().clamp_min(1e-300)), inner, tolerance)
    for factor in (0.0, size, 10 * size):
        expected = scale * raw(unit * factor)
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        error = (logits(unit * factor) - expected).abs().max().item()
        if not error <= tolerance * max(expected.abs().max().item(), 1e-3):
            raise AttachError(
                f"{name}: the logits are not a scaled and softcapped linear function of the decoder's last hidden "
                f"state (off by {error:.2e})"
            )
    return softcap, scale


def _snapped(value: float, inner: Any, tolerance: float) -> float:
    """A measured constant as the number it stands for: 1, a number of the configuration or its reciprocal, if close."""
    numbers = [v for c in adapter.configs(inner) for v in vars(c).values() if isinstance(v, (int, float)) and v]
    for candidate in (1.0, *numbers, *(1 / n for n in numbers)):
        if abs(value - candidate) <= tolerance * abs(candidate):
            return float(candidate)
    return value


class _Case(NamedTuple):
    """A forest, and what single sequences give at its predictions: logits [N, V], or hidden states without a head."""

    tree: PrefixTree
    weights: Tensor
    parameters: list[nn.Parameter]
    reference: Tensor
    gradients: list[Tensor]
    allowed: float


def _case(model: Any, inner: Any, head: Head | None, seed: int, exact: bool) -> _Case:
    embedding = inner.get_input_embeddings().weight
    paths, marker = _paths(seed, embedding.shape[0])
    # The first rows predict nothing: what the last layer leaves out would show where it was not the last.
    tree = PrefixTree.from_paths(paths, predict=[3] * len(paths), share=True, device=embedding.device)
    weights = torch.randn(tree.N, generator=torch.Generator().manual_seed(seed)).to(embedding.device)
    parameters = _gradient_parameters(model)
    _set_training(model, False)
    rows, gradients = [], [torch.zeros_like(p) for p in parameters]
    for s, path in enumerate(paths):
        own = slice(int(tree.offsets[s]), int(tree.offsets[s + 1]))
        ids = torch.tensor([path], device=embedding.device)
        if head is None:
            z = adapter.decoder(inner)(input_ids=ids, use_cache=False).last_hidden_state[0, 2:-1]
        else:
            z = model(input_ids=ids, use_cache=False).logits[0, 2:-1]
        rows.append(z.detach())
        for total, g in zip(gradients, _gradient(z, tree.target[own], weights[own], parameters), strict=True):
            total += g
    reference = torch.cat(rows).double()
    size = _rms(reference)
    # A wrong mask or position gets the context's contribution wrong, and that may be a small part of the logits.
    context = reference[[r for r in range(tree.N) if _input(tree, r) == marker]]
    allowed = min(max(0.01 * _rms(context - context.mean(0)), 1e-5 * size), 1e-4 * size) if exact else 0.05 * size
    return _Case(tree, weights, parameters, reference, gradients, allowed)


def _on_tree(inner: Any, head: Head | None, tree: PrefixTree, narrow: bool) -> Tensor:
    with adapter.witnesses() as seen:
        if narrow:
            hidden = adapter.tree_hidden(inner, tree, tree.loss_reads.rows).index_select(0, tree.loss_reads.at)
        else:
            hidden = adapter.tree_hidden(inner, tree).index_select(0, tree.loss_rows)
    layers = getattr(adapter.decoder(inner).config, "num_hidden_layers", 1)
    if len({id(module) for module in seen}) < layers:
        raise AttachError(
            f"{type(inner).__name__}: {len({id(module) for module in seen})} of {layers} layers attend through "
            "transformers' attention interface with forward arguments; the others (recurrent, or with attention "
            "written out in the model) can not follow a tree"
        )
    if head is None:
        return hidden
    z = head.logit_scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _difference(model: Any, inner: Any, head: Head | None, case: _Case, exact: bool, narrow: bool = False) -> str:
    """The reason why the tree differs from single sequences in logits (hidden states, without a head), or nothing."""
    what = "hidden states" if head is None else "logits"
    _set_training(model, True)
    z = _on_tree(inner, head, case.tree, narrow)
    size, error = _rms(case.reference), _rms(z.detach().double() - case.reference)
    if not error <= case.allowed:
        _set_training(model, False)
        quiet = _rms(_on_tree(inner, head, case.tree, narrow).detach().double() - case.reference)
        if quiet <= case.allowed:
            return f"training mode changes the {what} by {error / size:.1e}: active dropout{_dropouts(model)}"
        return f"{what} on a tree differ from those of single sequences by {error / size:.1e} of their size"
    found = _gradient(z, case.tree.target, case.weights, case.parameters)
    everything = sum(float(g.double().square().sum()) for g in case.gradients) ** 0.5
    slack = 1.0 if exact else 50.0
    for parameter, expected, got in zip(case.parameters, case.gradients, found, strict=True):
        distance, size = float((got - expected).double().norm()), float(expected.double().norm())
        if not distance <= slack * (1e-3 * size + 1e-5 * everything):
            name = next(n for n, p in model.named_parameters() if p is parameter)
            return f"the gradient of {name} on a tree is off that of single sequences by {distance:.1e} of {size:.1e}"
    return ""


def _narrows(model: Any, inner: Any, head: Head | None, case: _Case, exact: bool) -> bool:
    """Hooks the last layer, and takes the hooks off where it can not leave out rows."""
    hooks = None
    try:
        _set_training(model, False)
        with torch.no_grad():
            hooks = last_layer.find(adapter.decoder(inner), lambda: adapter.tree_hidden(inner, case.tree))
        narrows = not _difference(model, inner, head, case, exact, narrow=True)
    except Exception:  # whatever a layer of another form makes of tensors with fewer rows
        narrows = False
    if hooks is not None and not narrows:
        hooks.remove()
    return narrows


def _paths(seed: int, vocabulary: int) -> tuple[list[list[int]], int]:
    """Two trees with branches inside branches, mixed lengths; the marker token stands before the end of each path."""
    source = random.Random(seed)

    def fresh(n: int) -> list[int]:
        return [source.randrange(vocabulary) for _ in range(n)]

    marker = source.randrange(vocabulary)
    first, second, branch = fresh(5), fresh(3), fresh(2)
    bodies = [first + branch, first + branch + fresh(3), first + fresh(1), first, second + fresh(1), second + fresh(5)]
    return [body + [marker] + fresh(1) for body in bodies], marker


def _input(tree: PrefixTree, row: int) -> int:
    return int(tree.input_ids[tree.loss_rows[row]])


def _gradient(z: Tensor, target: Tensor, weights: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    if not parameters:
        return []
    logp = torch.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
    label = target[:, None] % z.shape[1]  # hidden states are fewer than tokens, and any function of them will do
    loss = (logp.gather(1, label)[:, 0] * weights.to(logp)).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def _gradient_parameters(model: Any) -> list[nn.Parameter]:
    """The trainable parameters, smallest first, as many as fit the limit: the norms and biases of every layer lead."""
    chosen, total = [], 0
    for p in sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel()):
        total += p.numel()
        if total > GRADIENT_LIMIT:
            break
        chosen.append(p)
    return chosen


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _dropouts(model: Any) -> str:
    active = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    for name, module in model.named_modules():
        rates = [a for a, value in vars(module).items() if "dropout" in a and isinstance(value, float) and value > 0]
        active += [f"{name}.{rate}" for rate in rates]
    return f" ({', '.join(active[:3])}{', ...' if len(active) > 3 else ''}); set it to 0" if active else ""
