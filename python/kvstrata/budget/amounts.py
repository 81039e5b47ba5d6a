"""What a ledger is asked for, checked: amounts by resource, and limits that a scope may have."""

from __future__ import annotations

from kvstrata.budget.account import RECLAIMABLE, RESOURCES, Node
from kvstrata.budget.sizes import size


def title(node: Node) -> str:
    return f"{node.scope.level} {node.scope.name!r}"


def fits_above(parent: Node, resource: str, limit: int, held: int) -> None:
    """ValueError unless every scope that pays for a child's limit has it left, ``held`` of it being the child's already."""
    for payer in parent.paying(resource):
        counter = payer.counters[resource]
        if counter.limit is not None and limit > counter.limit - counter.taken + held:
            raise ValueError(
                f"limit: {resource} is {limit}, expected at most the {counter.limit - counter.taken + held} that "
                f"{title(payer)} has left"
            )


def may_set(node: Node, resource: str, limit: int | None) -> None:
    counter = node.counters[resource]
    if limit is None:
        if counter.granted is not None:
            raise ValueError(f"limit: {resource} of {title(node)} was granted, expected a number")
        return
    if limit < counter.taken:
        raise ValueError(
            f"limit: {resource} is {limit}, expected at least used {counter.used} + reserved {counter.reserved}"
        )
    if node.parent is not None and resource not in node.apart:
        held = counter.taken if counter.granted is None else counter.granted
        fits_above(node.parent, resource, limit, held)


def amounts_of(verb: str, amounts: dict[str, int]) -> dict[str, int]:
    for resource, n in amounts.items():
        if resource not in RESOURCES:
            raise ValueError(f"{verb}: resource is {resource!r}, expected one of {', '.join(RESOURCES)}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"{verb}: {resource} is {n!r}, expected an int >= 0")
    return dict(amounts)


def checked(verb: str, limits: dict[str, int | None] | dict[str, int | str | None]) -> dict[str, int | None]:
    sizes = {r: size(f"{verb}: {r}", n) if r in RECLAIMABLE else n for r, n in limits.items()}
    amounts_of(verb, {r: n for r, n in sizes.items() if n is not None})  # type: ignore[misc]
    return sizes  # type: ignore[return-value]
