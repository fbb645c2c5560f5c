"""All cases, by name."""

from __future__ import annotations

import itertools

from tests.campaign.exact_resume import layers, optimizers, practices, real_models, schedulers
from tests.campaign.exact_resume.runs import Case


def _collect() -> dict[str, Case]:
    found: dict[str, Case] = {}
    homes = (optimizers, schedulers, layers, practices, real_models)
    for case in itertools.chain.from_iterable(home.cases() for home in homes):
        assert case.name not in found, f"two cases are called {case.name}"
        found[case.name] = case
    return found


CASES = _collect()
SHORT = [case.name for case in CASES.values() if not case.long]
