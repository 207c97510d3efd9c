"""Labels of shards that were made by others: which classes there are, and which number each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline import imagenet
from pipeline.store import ShardError

Class = tuple[int | None, str | None]
"""What a sample says of its class: a number, a name, or both."""


def assign(
    seen: Mapping[Class, str], listed: Sequence[str] | None, labels: str
) -> tuple[list[str], dict[Class, int]]:
    """The names of all classes, and the label of each class seen, which is a place among them.

    `imagenet`: the indices of ImageNet's 1,000, by wnid where there are wnids, else by number. `own`: the numbers
    where they are 0 to n-1 (or places in `listed`), otherwise 0 to n-1 in the order of the names.

    Args:
        seen: classes, and for each a sample that has it, for errors.
        listed: names by number, if a file beside the shards has them.
    Raises: ShardError for a name with two numbers, a number with two names, or a class without the one it needs.
    """
    names, numbers = _matched(seen, listed)
    full = {
        (number, name): (numbers.get(name) if number is None else number, names.get(number) if name is None else name)
        for number, name in seen
    }
    if labels == "imagenet":
        return list(imagenet.wnids()), _imagenets(full, seen)
    classes, label_of = _own(full, seen, names, listed)
    if set(classes) == set(imagenet.wnids()) and classes != list(imagenet.wnids()):
        raise ShardError(
            "the shards hold ImageNet's 1,000 classes, but their numbers are not ImageNet's usual ones: "
            "set data.labels to imagenet, which goes by the wnids"
        )
    return classes, label_of


def _matched(
    seen: Mapping[Class, str], listed: Sequence[str] | None
) -> tuple[dict[int | None, str], dict[str | None, int]]:
    names: dict[int | None, str] = {}
    numbers: dict[str | None, int] = {}
    for (number, name), where in seen.items():
        if number is None or name is None:
            continue
        if names.setdefault(number, name) != name:
            raise ShardError(f"{where} has the class {name} and the number {number}, elsewhere that of {names[number]}")
        if numbers.setdefault(name, number) != number:
            raise ShardError(f"{where} has the class {name} and the number {number}, elsewhere {numbers[name]}")
    for number, name in enumerate(listed or ()):
        found = names.setdefault(number, name)
        if imagenet.WNID.fullmatch(name) and imagenet.WNID.fullmatch(found) and name != found:
            where = next(where for known, where in seen.items() if known == (number, found))
            raise ShardError(f"{where} has the class {found} and the number {number}, {name}'s in the list of classes")
        numbers.setdefault(name, number)
    return names, numbers


def _imagenets(full: Mapping[Class, Class], seen: Mapping[Class, str]) -> dict[Class, int]:
    place = {wnid: place for place, wnid in enumerate(imagenet.wnids())}
    by_wnid = any(name in place for _, name in full.values())
    label_of: dict[Class, int] = {}
    for known, (number, name) in full.items():
        if by_wnid and name in place:
            label_of[known] = place[name]
        elif not by_wnid and number is not None and number < len(place):
            label_of[known] = number
        else:
            told = name if name is not None else f"number {number}"
            raise ShardError(f"{seen[known]}: class {told} is none of ImageNet's 1,000: set data.labels to own")
    return label_of


def _own(
    full: Mapping[Class, Class], seen: Mapping[Class, str], names: Mapping[int | None, str],
    listed: Sequence[str] | None,
) -> tuple[list[str], dict[Class, int]]:
    numbers = sorted({number for number, _ in full.values() if number is not None})
    all_numbered = all(number is not None for number, _ in full.values())
    if listed and all_numbered:
        beyond = [where for known, where in seen.items() if (full[known][0] or 0) >= len(listed)]
        if beyond:
            raise ShardError(f"{beyond[0]} has a number beyond the {len(listed)} classes that are listed")
        return list(listed), {known: number for known, (number, _) in full.items() if number is not None}
    if all_numbered and numbers == list(range(len(numbers))):
        classes = [names.get(number, str(number)) for number in numbers]
        return classes, {known: number for known, (number, _) in full.items() if number is not None}
    nameless = [known for known, (_, name) in full.items() if name is None]
    if nameless and all_numbered:
        gap = min(set(range(numbers[-1])) - set(numbers))
        raise ShardError(
            f"classes have the numbers 0 to {numbers[-1]}, but no image has {gap}: set data.labels to imagenet if they "
            "are ImageNet's, or put a classes.txt beside the shards, with the name of each number's class in its line"
        )
    if nameless:
        number, where = nameless[0][0], seen[nameless[0]]
        raise ShardError(f"{where} has class number {number}, of which no name is known, and others have names only")
    classes = sorted({name for _, name in full.values() if name is not None})
    place = {name: place for place, name in enumerate(classes)}
    return classes, {known: place[name] for known, (_, name) in full.items() if name is not None}
