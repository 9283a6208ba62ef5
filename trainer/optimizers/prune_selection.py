"""Which weights are pruned: exactly so many, the same ones however parameters are divided over ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sharding.part import Part
from sharding.state import element_indices, name_key

_DIGIT_BITS = 8
_RADIX = 1 << _DIGIT_BITS
_KEY_DIGITS = 4
_INFINITY_BITS = 0x7F800000


@dataclass(frozen=True)
class Scored:
    """This rank's part of a parameter, and how its elements rank.

    Attributes:
        part: the parameter's, which says where the elements lie in the whole.
        keys: int32, of the shape of the part's tensor; the smallest are pruned first, see ``sort_keys``.
    """

    part: Part
    keys: torch.Tensor


@dataclass(frozen=True)
class _Elements:
    """Some elements of a part.

    Attributes:
        positions: where they are in the part's memory, int64 [elements].
        places: where they are in the group, parameter by parameter and row-major inside, int64 [elements].
    """

    positions: torch.Tensor
    places: torch.Tensor


def sort_keys(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Integers in the order of fp32 scores, which are not negative; what the mask has pruned comes before all else.

    The bits of such floats are in their order as integers. What is not a number ranks as infinite.

    Args:
        scores: fp32, any shape.
        mask: of the same shape, False where an element is pruned already.
    """
    bits = scores.abs().view(torch.int32).clamp(max=_INFINITY_BITS)
    return torch.where(mask, bits + 1, 0).contiguous()


def random_scores(part: Part) -> torch.Tensor:
    """Numbers without a pattern, fp32, of the shape of a part: functions of each element's name and place in the whole.

    They are the same in every run and under every layout.
    """
    device = part.tensor.device
    scores = torch.zeros(part.tensor.numel(), device=device)
    begin = 0
    for box in part.boxes:
        indices = element_indices(torch.arange(box.num_elements, device=device), box, part.global_shape)
        # splitmix64 (Steele et al., 2014), of which 31 bits are taken.
        mixed = indices * -0x61C8864680B583EB + name_key(part.name)
        mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
        mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
        scores[begin : begin + box.num_elements] = (mixed >> 32 & 0x7FFFFFFF).float()
        begin += box.num_elements
    return scores.view(part.tensor.shape)


def smallest(groups: Sequence[Sequence[Scored]], counts: Sequence[int], num_ranks: int) -> list[list[torch.Tensor]]:
    """Mark the smallest elements of each group, exactly as many as asked for; every rank must call it.

    Equal keys are told apart by the place in the group: parameter by parameter in the order given, row-major inside.

    Args:
        groups: this rank's parts of the parameters of each group; the same parameters on every rank.
        counts: elements to mark in each group, at most as many as it has.
        num_ranks: ranks in the default process group.

    Returns:
        For each part a boolean tensor of its shape.
    """
    device = groups[0][0].keys.device
    wanted = torch.tensor(counts, dtype=torch.int64, device=device)
    keys = [[one.keys.reshape(-1) for one in group if one.part.is_written_here] for group in groups]
    threshold, left, num_equal = _kth_smallest(keys, wanted, _KEY_DIGITS, num_ranks)
    marked = [
        # The smallest of none would be the smallest key there is.
        [
            one.keys < threshold[index] if counts[index] else torch.zeros_like(one.keys, dtype=torch.bool)
            for one in group
        ]
        for index, group in enumerate(groups)
    ]
    equal = [_equal_elements(group, threshold[index]) for index, group in enumerate(groups)]
    last_place = torch.full_like(threshold, torch.iinfo(torch.int64).max)
    if bool((left < num_equal).any()):
        places = [
            [element.places for element, one in zip(elements, group, strict=True) if one.part.is_written_here]
            for elements, group in zip(equal, groups, strict=True)
        ]
        largest = max(sum(math.prod(one.part.global_shape) for one in group) for group in groups)
        last_place, *_ = _kth_smallest(places, left, -(-largest.bit_length() // _DIGIT_BITS), num_ranks)
    for index, elements in enumerate(equal):
        for mark, element in zip(marked[index], elements, strict=True):
            if counts[index]:
                mark.view(-1)[element.positions[element.places <= last_place[index]]] = True
    return marked


def smaller_half_of_fours(scored: Scored) -> torch.Tensor:
    """Mark the two smallest of each four neighbours in a row; of equal ones the first.

    A row is a slice of dim 0, flattened: of a matrix its last dim, of a convolution all weights of one output.

    Returns:
        A boolean tensor of the part's shape.

    Raises:
        RuntimeError: this rank holds groups of four in pieces.
    """
    part, keys = scored.part, scored.keys
    for box, piece in part.pieces():
        first = element_indices(torch.zeros(1, dtype=torch.int64), box, part.global_shape)
        if int(first) % 4 or piece.numel() % 4:
            raise RuntimeError(f"{part.name} is divided over ranks within groups of four")
    order = keys.reshape(-1, 4).argsort(dim=1, stable=True)
    marked = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :2], True)
    return marked.view(keys.shape)


def sum_over_world(counts: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Add up integers over all ranks, in place."""
    if num_ranks > 1:
        dist.all_reduce(counts)
    return counts


def _kth_smallest(
    groups: Sequence[Sequence[torch.Tensor]], ks: torch.Tensor, num_digits: int, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k-th smallest of each group of integers that are divided over ranks, by radix select.

    From the highest digit down, one all-reduce of how often each of 256 values of the digit comes among those that have
    the digits found so far.

    Args:
        groups: this rank's integers, not negative; each of all ranks' once.
        ks: which of each group, from 1, int64 [groups].
        num_digits: of eight bits each.
        num_ranks: ranks in the default process group.

    Returns:
        The integers; how many equal ones of each are among the k smallest; and how many equal ones there are.
    """
    found, left = torch.zeros_like(ks), ks.clone()
    num_equal = torch.zeros_like(ks)
    highest = _DIGIT_BITS * (num_digits - 1)
    for shift in range(highest, -1, -_DIGIT_BITS):
        counts = torch.zeros(len(groups), _RADIX, dtype=torch.int64, device=ks.device)
        for index, group in enumerate(groups):
            for values in group:
                alike = values if shift == highest else values[values >> (shift + _DIGIT_BITS) == found[index]]
                counts[index] += torch.bincount((alike >> shift) & (_RADIX - 1), minlength=_RADIX)
        before = sum_over_world(counts, num_ranks).cumsum(dim=1)
        digit = (before < left[:, None]).sum(dim=1, keepdim=True).clamp(max=_RADIX - 1)
        num_equal = counts.gather(1, digit).squeeze(1)
        left = left - (before.gather(1, digit).squeeze(1) - num_equal)
        found = found << _DIGIT_BITS | digit.squeeze(1)
    return found, left, num_equal


def _equal_elements(group: Sequence[Scored], threshold: torch.Tensor) -> list[_Elements]:
    """The elements of each part of a group whose key is the threshold."""
    found, first = [], 0
    for one in group:
        flat, begin = (one.keys == threshold).reshape(-1), 0
        positions, places = [], []
        for box in one.part.boxes:
            inside = flat[begin : begin + box.num_elements].nonzero().squeeze(1)
            positions.append(begin + inside)
            places.append(first + element_indices(inside, box, one.part.global_shape))
            begin += box.num_elements
        nothing = torch.zeros(0, dtype=torch.int64, device=flat.device)
        found.append(_Elements(torch.cat([nothing, *positions]), torch.cat([nothing, *places])))
        first += math.prod(one.part.global_shape)
    return found
