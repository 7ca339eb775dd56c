"""Several questions about one image: the image is read once, and each question continues from a copy of that state.

In a model that reads strictly left to right, everything up to the image's last token is the same for every question
about it. It is run once; its cache, attention keys and Mamba states alike, is then copied to the rows of the questions.
These are batched with others of exactly their length, so no padding comes between image and question, where a causal
convolution would see it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matvlm.evaluate.harness import Query

T = TypeVar("T")

FAMILIES = frozenset({"llava"})
"""``model_type`` of the families known to qualify: causal over image tokens too, as many tokens for every image, and
positions that are counted from the attention mask alone."""


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """``items`` in pieces of ``size``; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def shares_prefixes(model: Any, processor: Any, queries: Sequence[Query]) -> bool:
    """Whether ``queries`` ask a model of ``FAMILIES`` at least two questions per image, alike up to the image."""
    return (
        model.config.model_type in FAMILIES
        and all(len(query.images) == 1 for query in queries)
        and 2 * len({query.image_key for query in queries}) <= len(queries)
        and len({query.prompt.partition(processor.image_token)[0] for query in queries}) == 1
    )


def shared_prefix_batches(
    model: Any,
    tokenizer: Any,
    encode: Callable[[Sequence[Query]], dict[str, Tensor]],
    queries: Sequence[Query],
    batch_size: int,
) -> Iterator[tuple[Sequence[Query], dict[str, Any]]]:
    """Batches of ``queries`` with what ``generate`` needs to answer them: whole prompts and a cache of their prefixes.

    At most ``batch_size`` prefixes are held while their questions are answered, ``batch_size`` at a time.
    """
    image_token = model.config.image_token_id
    by_image: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        by_image[query.image_key].append(query)
    for group in chunks(list(by_image.values()), batch_size):
        prefixes, cache = _read_images(model, encode([members[0] for members in group]), image_token)
        by_length: dict[int, list[tuple[Query, int, list[int]]]] = defaultdict(list)
        for row, members in enumerate(group):
            for query in members:
                ids = tokenizer(query.prompt, add_special_tokens=False)["input_ids"]
                tail = ids[ids.index(image_token) + 1 :]
                by_length[len(tail)].append((query, row, tail))
        for alike in by_length.values():
            for batch in chunks(alike, batch_size):
                chosen, rows, tails = zip(*batch, strict=True)
                index = torch.tensor(rows, device=prefixes.device)
                input_ids = torch.cat([prefixes[index], torch.tensor(tails, device=prefixes.device)], dim=1)
                mask = torch.ones_like(input_ids)
                past = _rows(cache, index)
                yield chosen, {"input_ids": input_ids, "attention_mask": mask, "past_key_values": past}


def _read_images(model: Any, inputs: dict[str, Tensor], image_token: int) -> tuple[Tensor, Any]:
    """Run left-padded prompts up to their last image token: these ids, int64 [images, P], and the cache they leave."""
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
    rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    prefixes = torch.stack([row[: int((row == image_token).nonzero()[-1]) + 1] for row in rows])
    output = model(
        input_ids=prefixes, attention_mask=torch.ones_like(prefixes), **inputs, use_cache=True, logits_to_keep=1
    )
    return prefixes, output.past_key_values


def _rows(cache: Any, index: Tensor) -> Any:
    """A cache with the rows ``index`` of ``cache``, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    chosen.reorder_cache(index)
    return chosen
