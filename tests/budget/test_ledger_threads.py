"""The ledger under eight threads: never oversubscribed at any observed moment, all zero in the end."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

from kvstrata import BudgetExceeded
from kvstrata.budget import Hold, Ledger, Scope
from kvstrata.budget.account import CONSUMED, RESOURCES


def random_life(ledger: Ledger, scope: Scope, rng: random.Random, steps: int) -> Iterator[None]:
    """Reserves, draws, commits, rolls back and frees at random, and gives everything back in the end."""
    holds: list[Hold] = []
    held = {"near_bytes": 0, "far_bytes": 0}
    for _ in range(steps):
        verb = rng.random()
        if verb < 0.4 or not holds:
            asked = {rng.choice(list(held)): rng.randrange(60), "plans": 1}
            try:
                holds.append(ledger.reserve(scope, **asked))
            except BudgetExceeded:
                resource = max(held, key=lambda r: held[r])
                ledger.free(scope, **{resource: held[resource]})
                held[resource] = 0
        else:
            hold = holds[rng.randrange(len(holds))]
            resource = "near_bytes" if hold.left("near_bytes") else "far_bytes"
            n = rng.randrange(hold.left(resource) + 1)
            if verb < 0.6:
                hold.draw(**{resource: n})
                held[resource] += n
                continue
            holds.remove(hold)
            if verb < 0.8 and n:
                hold.commit(**{resource: n})
                held[resource] += n
            else:
                hold.rollback()
        yield
    for hold in holds:
        hold.rollback()
    ledger.free(scope, **held)


def test_eight_threads_never_oversubscribe() -> None:
    """8 x 10,000 random steps on four caches of two sequences, one of them with a grant, watched all the while."""
    ledger = Ledger(near=1500, far=1500)
    caches = [ledger.open(near_bytes=600, far_bytes=700) for _ in range(4)]
    scopes = [ledger.open(cache, near_bytes=200, grant=True) for cache in caches]
    scopes += [ledger.open(cache, near_bytes=300) for cache in caches]
    errors: list[BaseException] = []
    running = threading.Event()
    running.set()

    def live(i: int) -> None:
        try:
            for _ in random_life(ledger, scopes[i], random.Random(i), 10_000):
                pass
        except BaseException as error:
            errors.append(error)

    def watch() -> None:
        plans = 0
        try:
            while running.is_set():
                for scope in [ledger.root, *scopes]:
                    report = ledger.report(scope)
                    for name in RESOURCES:
                        account = getattr(report, name)
                        assert account.used >= 0 and account.reserved >= 0
                        assert account.remaining is None or account.remaining >= 0
                now = ledger.report().plans.used
                assert now >= plans, "consumed never falls"
                plans = now
        except BaseException as error:
            errors.append(error)

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=live, args=(i,)) for i in range(8)]
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    running.clear()
    watcher.join()
    assert not errors, errors
    granted = sum(c.granted or 0 for n in ledger._nodes.values() for c in n.counters.values())
    assert granted == 800
    for node in ledger._nodes.values():
        for name, counter in node.counters.items():
            assert counter.own == 0 or name in CONSUMED
            assert counter.used == 0 or name in CONSUMED
    assert ledger.report().near_bytes.reserved == granted and ledger.report().far_bytes.reserved == 0
    assert ledger.report().near_bytes.high_water > 500, "the limits were in play"
    assert ledger.report().plans.used > 0
