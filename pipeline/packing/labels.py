"""Assigns labels to the classes of existing shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.base import imagenet
from pipeline.base.errors import ShardError

SampleClass = tuple[int | None, str | None]
"""The class of a sample as the shard states it: a number, a name, or both."""


def assign_labels(
    examples: Mapping[SampleClass, str], class_names: Sequence[str] | None, labels: str
) -> tuple[list[str], dict[SampleClass, int]]:
    """Returns the names of all classes, and the label of each class of the samples. A label is an index into the names.

    `imagenet` uses the indices of ImageNet's 1,000 classes, matched by wnid if the shards have wnids and otherwise by
    number. `own` uses the numbers of the shards if they are 0 to n-1 (or indices into `class_names`), and otherwise 0
    to n-1 in the order of the names.

    Args:
        examples: the classes of the samples, each with the name of one sample for error messages.
        class_names: names by number, if a file beside the shards lists them.
    Raises: ShardError for a name with two numbers, a number with two names, or a class without a name or number that it
        needs.
    """
    names, numbers = _match_names_and_numbers(examples, class_names)
    completed = {
        (number, name): (numbers.get(name) if number is None else number, names.get(number) if name is None else name)
        for number, name in examples
    }
    if labels == "imagenet":
        return list(imagenet.wnids()), _imagenet_labels(completed, examples)
    classes, label_of = _own_labels(completed, examples, names, class_names)
    if set(classes) == set(imagenet.wnids()) and classes != list(imagenet.wnids()):
        raise ShardError(
            "the shards hold ImageNet's 1,000 classes, but their numbers are not ImageNet's usual ones: "
            "set data.labels to imagenet, which matches classes by wnid"
        )
    return classes, label_of


def _match_names_and_numbers(
    examples: Mapping[SampleClass, str], class_names: Sequence[str] | None
) -> tuple[dict[int | None, str], dict[str | None, int]]:
    names: dict[int | None, str] = {}
    numbers: dict[str | None, int] = {}
    for (number, name), example in examples.items():
        if number is None or name is None:
            continue
        if names.setdefault(number, name) != name:
            raise ShardError(
                f"{example} has the class {name} and the number {number}, which belongs to {names[number]} elsewhere"
            )
        if numbers.setdefault(name, number) != number:
            raise ShardError(f"{example} has the class {name} and the number {number}, but {numbers[name]} elsewhere")
    for number, name in enumerate(class_names or ()):
        found = names.setdefault(number, name)
        if imagenet.WNID_PATTERN.fullmatch(name) and imagenet.WNID_PATTERN.fullmatch(found) and name != found:
            example = next(example for class_, example in examples.items() if class_ == (number, found))
            raise ShardError(
                f"{example} has the class {found} and the number {number}, which is {name} in the list of classes"
            )
        numbers.setdefault(name, number)
    return names, numbers


def _imagenet_labels(
    completed: Mapping[SampleClass, SampleClass], examples: Mapping[SampleClass, str]
) -> dict[SampleClass, int]:
    label_of_wnid = {wnid: label for label, wnid in enumerate(imagenet.wnids())}
    by_wnid = any(name in label_of_wnid for _, name in completed.values())
    label_of: dict[SampleClass, int] = {}
    for class_, (number, name) in completed.items():
        if by_wnid and name in label_of_wnid:
            label_of[class_] = label_of_wnid[name]
        elif not by_wnid and number is not None and number < len(label_of_wnid):
            label_of[class_] = number
        else:
            description = name if name is not None else f"number {number}"
            raise ShardError(
                f"{examples[class_]}: class {description} is not one of ImageNet's 1,000: set data.labels to own"
            )
    return label_of


def _own_labels(
    completed: Mapping[SampleClass, SampleClass],
    examples: Mapping[SampleClass, str],
    names: Mapping[int | None, str],
    class_names: Sequence[str] | None,
) -> tuple[list[str], dict[SampleClass, int]]:
    numbers = sorted({number for number, _ in completed.values() if number is not None})
    all_numbered = all(number is not None for number, _ in completed.values())
    if class_names and all_numbered:
        out_of_range = [
            example for class_, example in examples.items() if (completed[class_][0] or 0) >= len(class_names)
        ]
        if out_of_range:
            raise ShardError(
                f"{out_of_range[0]} has a class number that is not below {len(class_names)}, the class_names classes"
            )
        return list(class_names), {class_: number for class_, (number, _) in completed.items() if number is not None}
    if all_numbered and numbers == list(range(len(numbers))):
        classes = [names.get(number, str(number)) for number in numbers]
        return classes, {class_: number for class_, (number, _) in completed.items() if number is not None}
    unnamed = [class_ for class_, (_, name) in completed.items() if name is None]
    if unnamed and all_numbered:
        gap = min(set(range(numbers[-1])) - set(numbers))
        raise ShardError(
            f"classes have the numbers 0 to {numbers[-1]}, but no image has {gap}: set data.labels to imagenet if they "
            "are ImageNet's, or add a classes.txt to the folder of the shards, with one class name per line"
        )
    if unnamed:
        number, example = unnamed[0][0], examples[unnamed[0]]
        raise ShardError(f"{example} has class number {number} without a name, and other samples have only names")
    classes = sorted({name for _, name in completed.values() if name is not None})
    label_of_name = {name: label for label, name in enumerate(classes)}
    return classes, {class_: label_of_name[name] for class_, (_, name) in completed.items() if name is not None}
