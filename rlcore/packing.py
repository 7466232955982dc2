"""Which sequences go through the model together: groups with a shared prompt, packed into micro-batches by length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

from rlcore.prefix_tree_build import count, is_int

# (sizes, most) -> indices of the sizes in each bin. A size above `most` has a bin of its own; sizes of 0 go with
# others, so that no micro-batch is without rows.
Fit = Callable[[Sequence[int], int], list[list[int]]]


def pack_groups(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], max_tokens: int, whole_groups: bool = False
) -> list[list[int]]:
    """Micro-batches of at most `max_tokens` packed tokens, as lists of sequence indices.

    prompts [P] and responses [P][G_p] are lengths in tokens; sequences are numbered group by group. A group counts its
    prompt once and all its responses, and stays together: it is split only where it alone exceeds max_tokens, and then
    each part counts the prompt again; a response that exceeds max_tokens with its prompt is a micro-batch of its own.
    Empty responses of a group that is split go with others. `whole_groups` never splits, for objectives of group scope.
    Best fit, largest first, equal sizes by index; where filling one micro-batch after the other in order needs fewer,
    that. Sequences rise inside a micro-batch, micro-batches by their first sequence.
    Raises ValueError or TypeError that name the argument.
    """
    check(prompts, responses, max_tokens)
    packings = (packed(prompts, responses, max_tokens, whole_groups, fit) for fit in (best_fit, next_fit))
    return min(packings, key=len)


def packed(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], most: int, whole_groups: bool, fit: Fit
) -> list[list[int]]:
    """Groups, or their parts, as items; items into bins; both by `fit`."""
    items: list[list[int]] = []
    sizes: list[int] = []
    first = 0
    for prompt, lengths in zip(prompts, responses, strict=True):
        together = whole_groups or prompt + sum(lengths) <= most
        whole = [list(range(len(lengths)))] if len(lengths) else []
        for part in whole if together else fit(lengths, most - prompt):
            items.append([first + i for i in part])
            sizes.append(prompt + sum(lengths[i] for i in part))
        first += len(lengths)
    return sorted(sorted(s for item in chosen for s in items[item]) for chosen in fit(sizes, most))


def best_fit(sizes: Sequence[int], most: int) -> list[list[int]]:
    """The largest first, each into the fullest bin that has room for it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), rising
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not sizes[i] and bins:
            bins[0].append(i)
            continue
        at = bisect_left(room, (sizes[i], 0))
        free, own = room.pop(at) if at < len(room) else (most, len(bins))
        if own == len(bins):
            bins.append([])
        bins[own].append(i)
        insort(room, (free - sizes[i], own))
    return bins


def next_fit(sizes: Sequence[int], most: int) -> list[list[int]]:
    """In order, a new bin wherever the last one has no room."""
    bins: list[list[int]] = []
    free = 0
    for i, size in enumerate(sizes):
        if not bins or (0 < size > free < most):
            bins.append([])
            free = most
        bins[-1].append(i)
        free -= size
    return bins


def check(prompts: Sequence[int], responses: Sequence[Sequence[int]], max_tokens: int) -> None:
    if count(prompts, "prompts") != count(responses, "responses"):
        raise ValueError(f"responses: expected one list per prompt ({len(prompts)}), got {len(responses)}")
    if not is_int(max_tokens) or max_tokens < 1:
        raise ValueError(f"max_tokens: expected a positive int, got {max_tokens!r}")
    for g, (prompt, lengths) in enumerate(zip(prompts, responses, strict=True)):
        count(lengths, f"responses[{g}]")
        for name, length in ((f"prompts[{g}]", prompt), *((f"responses[{g}][{i}]", x) for i, x in enumerate(lengths))):
            if not is_int(length) or length < 0:
                raise ValueError(f"{name}: expected a length in tokens, got {length!r}")
