"""The packer written slowly and plainly in Python: what the C++ one is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inverseq.records import Sample

__all__ = ["oracle_pack", "oracle_plan"]


def oracle_plan(
    lengths: Sequence[int],
    *,
    token_budget: int,
    num_ranks: int = 1,
    step_sizes: Sequence[int] | None = None,
    shared_tokens: int = 0,
    linear_cost: float = 1.0,
    attention_cost: float = 0.0,
) -> list[list[list[list[int]]]]:
    """steps × ranks × packs -> sample indices. Costs must be exact in floating point for ties to be decided alike."""
    capacity = token_budget - shared_tokens
    steps, first = [], 0
    for size in [len(lengths)] if step_sizes is None else step_sizes:
        rooms = {i: lengths[i] - shared_tokens for i in range(first, first + size)}
        costs = {i: linear_cost * rooms[i] + attention_cost * lengths[i] ** 2 for i in rooms}
        first += size
        packs = _best_fit(rooms, capacity)
        num_micro_steps = -(-len(packs) // num_ranks)
        packs += [[] for _ in range(num_micro_steps * num_ranks - len(packs))]
        micro_steps = _micro_steps(packs, costs, num_ranks)
        if _duration(micro_steps, costs) * num_ranks > 1.02 * sum(costs.values()):
            even = _spread(rooms, costs, capacity, len(packs))
            if even is not None:
                even_micro_steps = _micro_steps(even, costs, num_ranks)
                if _duration(even_micro_steps, costs) < _duration(micro_steps, costs):
                    micro_steps = even_micro_steps
        steps.append(_deal(micro_steps, costs, num_ranks))
    return steps


def _decreasing(rooms: dict[int, int]) -> list[int]:
    return sorted(rooms, key=lambda i: (-rooms[i], i))


def _best_fit(rooms: dict[int, int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    left: list[int] = []
    changed: list[int] = []  # when a pack last got a sample: of equally tight packs the latest is taken
    for now, i in enumerate(_decreasing(rooms)):
        fitting = [p for p in range(len(packs)) if left[p] >= rooms[i]]
        if fitting:
            p = min(fitting, key=lambda p: (left[p], -changed[p]))
        else:
            p = len(packs)
            packs.append([])
            left.append(capacity)
            changed.append(now)
        packs[p].append(i)
        left[p] -= rooms[i]
        changed[p] = now
    return packs


def _spread(rooms: dict[int, int], costs: dict[int, float], capacity: int, num_packs: int) -> list[list[int]] | None:
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    for i in _decreasing(rooms):
        p = min(range(num_packs), key=lambda p: (_cost(packs[p], costs), p))
        packs[p].append(i)
        if sum(rooms[k] for k in packs[p]) > capacity:
            return None
    return packs


def _cost(pack: list[int], costs: dict[int, float]) -> float:
    return sum(costs[i] for i in pack)


def _micro_steps(packs: list[list[int]], costs: dict[int, float], num_ranks: int) -> list[list[list[int]]]:
    ordered = sorted(packs, key=lambda pack: -_cost(pack, costs))
    return [ordered[k : k + num_ranks] for k in range(0, len(ordered), num_ranks)]


def _duration(micro_steps: list[list[list[int]]], costs: dict[int, float]) -> float:
    return sum(max(_cost(pack, costs) for pack in packs) for packs in micro_steps)


def _deal(micro_steps: list[list[list[int]]], costs: dict[int, float], num_ranks: int) -> list[list[list[int]]]:
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for packs in micro_steps:
        loads = [sum(_cost(pack, costs) for pack in rank) for rank in ranks]
        for rank, pack in zip(sorted(range(num_ranks), key=lambda r: (loads[r], r)), packs, strict=True):
            ranks[rank].append(pack)
    return ranks


def oracle_pack(
    samples: Sequence[Sample], indices: Sequence[int], views: Sequence[int], *, share_prefix: bool = False
) -> dict[str, list]:
    """The fields of PackedViews as lists, token by token."""
    pack: dict[str, list] = {
        "input_ids": [],
        "position_ids": [],
        "parent_seq": [],
        "seqlens": [],
        "action_index": [[] for _ in views],
        "token_ids": [int(token) for i in indices for token in samples[i].response.token_ids],
        "sample_index": [int(i) for i in indices for _ in samples[i].response.token_ids],
    }

    def add_sequence(tokens: list[int], first_position: int, parent: int) -> None:
        for position, token in enumerate(tokens, start=first_position):
            pack["input_ids"].append(token)
            pack["position_ids"].append(position)
        pack["parent_seq"].append(parent)
        pack["seqlens"].append(len(tokens))

    for number, (rows, view) in enumerate(zip(pack["action_index"], views, strict=True)):
        is_policys = number > 0 and number == len(views) - 1
        contexts = [
            np.concatenate([samples[i].rendered.prefix_ids[view], samples[i].rendered.prompt_ids]).tolist()
            for i in indices
        ]
        shared, parent = 0, -1
        if share_prefix and len(contexts) > 1 and not is_policys:
            while all(shared < len(c) - 1 and c[shared] == contexts[0][shared] for c in contexts):
                shared += 1
        if shared:
            parent = len(pack["seqlens"])
            add_sequence(contexts[0][:shared], 0, -1)
        for i, context in zip(indices, contexts, strict=True):
            response = samples[i].response.token_ids.tolist()
            start = len(pack["input_ids"]) - shared  # row of the sequence's position 0, were nothing shared
            rows.extend(start + len(context) - 1 + t for t in range(len(response)))
            add_sequence((context + response)[shared:-1], shared, parent)
    pack["cu_seqlens"] = np.cumsum([0, *pack["seqlens"]]).tolist()
    return pack
