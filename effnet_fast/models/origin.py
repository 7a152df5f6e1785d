"""What a network knows of where it is from: entries of a file's metadata, and their texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace
from typing import Any

from effnet_fast.checkpoints.facts import FACTS_ENTRY, IMAGE_FIELDS, Facts, facts_of
from effnet_fast.models.variants import MBCONV, VARIANTS, Variant

Origin = Iterable[tuple[str, str]]
STAGE_NUMBERS = 6  # of a stage, before its kind


def remembered(variant: Variant, origin: Origin) -> dict[str, str]:
    """What a state dict keeps beside tensors: where the network is from, else its own images."""
    entries = dict(origin)
    if FACTS_ENTRY not in entries and variant.name not in VARIANTS:
        images = {name: getattr(variant, name) for name in IMAGE_FIELDS}
        entries[FACTS_ENTRY] = Facts(images=images).as_text()
    return entries


def class_names(origin: Origin) -> tuple[str, ...]:
    """The names of the classes; () where they are not known."""
    text = dict(origin).get(FACTS_ENTRY)
    return facts_of(text).classes if text else ()


def with_class_names(
    variant: Variant, origin: Origin, names: Iterable[str]
) -> frozenset[tuple[str, str]]:
    """The origin with these names of classes."""
    names, entries = tuple(names), dict(origin)
    if names:  # beside which a size of one's own needs its images
        entries = remembered(variant, origin)
    facts = replace(facts_of(entries.pop(FACTS_ENTRY, "{}")), classes=names)
    if facts:
        entries[FACTS_ENTRY] = facts.as_text()
    return frozenset(entries.items())


def with_images(origin: Origin, images: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """The origin with another preset of images: fields of `models.Variant`."""
    entries = dict(origin)
    facts = facts_of(entries.pop(FACTS_ENTRY, "{}"))
    known = {name: images[name] for name in IMAGE_FIELDS if name in images}
    entries[FACTS_ENTRY] = replace(facts, images={**facts.images, **known}).as_text()
    return frozenset(entries.items())


def has_table(variant: Variant) -> bool:
    """Whether a table of widths, depths and stages tells the network: all of B0's kind."""
    return (
        all(stage.kind == MBCONV for stage in variant.baseline)
        and variant.squeeze
        and not variant.fixed_ends
        and (variant.activation, variant.padding) == ("silu", "symmetric")
    )


def with_table(origin: Origin, variant: Variant) -> frozenset[tuple[str, str]]:
    """The origin with the layers of a network of no published size, which a reader builds anew.

    variant: of a network that `has_table`.
    """
    entries = dict(origin)
    facts = facts_of(entries.pop(FACTS_ENTRY, "{}"))
    table = {
        "width": variant.width,
        "depth": variant.depth,
        "head": variant.head_channels,
        "baseline": [astuple(stage)[:STAGE_NUMBERS] for stage in variant.baseline],
    }
    network = {"bn_eps": variant.bn_eps, "bn_momentum": variant.bn_momentum}
    network["dropout"] = variant.dropout
    entries[FACTS_ENTRY] = replace(
        facts, table=table, network={**facts.network, **network}
    ).as_text()
    return frozenset(entries.items())
