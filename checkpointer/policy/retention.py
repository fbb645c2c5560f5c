"""Retention: which committed checkpoints stay, and why.

Pure: :func:`plan` looks at what is known about the checkpoints and returns a decision with printable reasons for
each one. The dry run prints the very plan that pruning carries out.

A checkpoint stays if any rule keeps it. Two principles stand above the rules, because they are what keeps a run
from being lost: what is needed (the newest commit, the newest finite one, pinned ones, the best ones, the one restored
from, those that ``on_commit`` has not returned for) is never removed; and checkpoints that are damaged or hold NaN
never take the place of a good one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from checkpointer.errors import ConfigError
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.monitoring import MODES, Mode, listed, nearest_name, resolve_mode
from checkpointer.policy.values import (
    FieldError,
    choice,
    count,
    duration,
    format_duration,
    format_size,
    optional,
    refuse_unknown,
    shown,
    size,
)

Reasons: TypeAlias = tuple[str, ...]
Decision: TypeAlias = tuple[CheckpointInfo, Reasons]
_Votes: TypeAlias = "Iterable[tuple[CheckpointInfo, str]]"
_Spared: TypeAlias = "Sequence[tuple[Collection[str], str]]"
_Order: TypeAlias = "tuple[int, datetime, int, str, str]"


@dataclass(frozen=True, kw_only=True)
class BestRule:
    """Keep the ``k`` checkpoints with the best value of one metric."""

    __module__ = "checkpointer"

    monitor: str
    """Name of the metric, as given to ``save`` or ``annotate``."""
    k: int = 1
    """How many to keep, at least 1."""
    mode: Mode = None  # type: ignore[assignment]  # never None once it is made
    """``"min"`` where lower is better (a loss), ``"max"`` where higher is (an accuracy). May be left out where the
    monitor's name says it; see :func:`~checkpointer.policy.monitoring.mode_by_name`."""

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for a value that makes no sense."""
        # Unprintable names (line breaks, lone surrogates) would not survive a YAML round trip, and no metric has them.
        monitor: object = self.monitor
        if not isinstance(monitor, str) or not monitor or not monitor.isprintable():
            raise FieldError(("monitor",), f"must name a metric, for example val_loss; got {shown(monitor)}")
        count("k", self.k, instead="leave the best rule out (null) to switch it off")
        mode: object = self.mode
        if mode is None:
            object.__setattr__(self, "mode", _mode_by_name(monitor))
        choice("mode", self.mode, MODES)


def _mode_by_name(monitor: str) -> Mode:
    mode = resolve_mode(monitor)
    if mode is None:
        raise FieldError(
            ("mode",),
            f"is missing, and the name {shown(monitor)} does not say it: write mode: min where lower is better, "
            "mode: max where higher is",
        )
    return mode


BestRules: TypeAlias = "BestRule | Mapping[str, object] | Sequence[BestRule | Mapping[str, object]] | None"


@dataclass(frozen=True, init=False)
class KeepPolicy:
    """Which checkpoints retention keeps: those that any rule keeps. No rule: all of them.

    Arguments may be written as in YAML (``every="12h"``, ``max_size="500GB"``, ``best={"monitor": "val_loss"}``);
    the fields hold the parsed values. Wrong values, zero included, raise :class:`ConfigError`.
    """

    __module__ = "checkpointer"

    last: int | None
    """The newest N commits."""
    best: tuple[BestRule, ...]
    """The best by each of these metrics; empty: no such rule."""
    every_n_steps: int | None
    """Those whose step is divisible by N."""
    every: timedelta | None
    """The first, then each that was created at least this long before or after the last one that this rule kept."""
    within: timedelta | None
    """Everything younger than this."""
    max_size: int | None
    """Budget in bytes for all kept checkpoints, applied after the rules; files that they share count once. A budget,
    not a rule: it keeps nothing."""

    def __init__(
        self,
        *,
        last: int | None = None,
        best: BestRules = None,
        every_n_steps: int | None = None,
        every: timedelta | str | None = None,
        within: timedelta | str | None = None,
        max_size: int | str | None = None,
    ) -> None:
        values = {
            "last": optional(count, "last", last),
            "best": _best_rules(best),
            "every_n_steps": optional(count, "every_n_steps", every_n_steps),
            "every": optional(duration, "every", every),
            "within": optional(duration, "within", within),
            "max_size": optional(size, "max_size", max_size),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def is_empty(self) -> bool:
        """True if nothing is set, not even ``max_size``."""
        return not (self.has_rules or self.max_size)

    @property
    def has_rules(self) -> bool:
        """True if any rule is set. ``max_size`` alone is none."""
        return bool(self.last or self.best or self.every_n_steps or self.every or self.within)


@dataclass(frozen=True)
class RetentionPlan:
    """What retention decides, in commit order, each checkpoint with its reasons. ``str()`` prints it line by line."""

    __module__ = "checkpointer"

    keep: list[Decision]
    """Checkpoints that stay."""
    remove: list[Decision]
    """Checkpoints that pruning removes."""

    @property
    def freed(self) -> int:
        """Bytes that removing frees: what is shared with a checkpoint that stays is not freed."""
        stay = [info for info, _ in self.keep]
        return physical_size([*stay, *(info for info, _ in self.remove)]) - physical_size(stay)

    def __str__(self) -> str:
        verdicts = [(_order(info), "keep", info.step, reasons) for info, reasons in self.keep]
        verdicts += [(_order(info), "remove", info.step, reasons) for info, reasons in self.remove]
        width = max((len(str(step)) for _, _, step, _ in verdicts), default=0)
        lines = [f"{verb:<6}  step {step:>{width}}  {', '.join(why)}" for _, verb, step, why in sorted(verdicts)]
        return "\n".join(lines) or "no checkpoints"


def plan(
    checkpoints: Iterable[CheckpointInfo],
    policy: KeepPolicy,
    *,
    now: datetime,
    protect: Collection[str] = (),
    unreturned: Collection[str] = (),
    stuck: Mapping[str, str] | None = None,
) -> RetentionPlan:
    """Decide for each checkpoint whether it stays.

    ``now`` is the current time (aware). ``protect`` holds the ids of checkpoints that must stay whatever the rules
    say: the one this process restored from. ``unreturned`` are those that ``on_commit`` has not returned for: they
    must stay, too. ``stuck``: why it was not possible to remove these, by id. They stay, and
    their bytes do not count against ``max_size``: otherwise good checkpoints would go in their place, one after the
    other, and the total would not come down. The order of ``checkpoints`` does not matter, and one that is listed
    twice is decided once. Planning the kept ones again with the same arguments removes nothing.
    """
    survivors = _in_commit_order(checkpoints)
    spared: _Spared = ((protect, "restored from"), (unreturned, "on_commit has not returned"))
    removed: list[Decision] = []
    # What max_size removes may have been the reason why `every` kept another one. So go on until nothing changes:
    # otherwise the next call, with nothing new to look at, would remove more.
    while True:
        kept, dropped = _decide(survivors, policy, now, spared, stuck or {})
        removed += dropped
        if not dropped:
            return RetentionPlan(keep=kept, remove=sorted(removed, key=lambda decision: _order(decision[0])))
        survivors = [info for info, _ in kept]


def rank(checkpoints: Iterable[CheckpointInfo], rule: BestRule) -> list[CheckpointInfo]:
    """The usable checkpoints that report a finite ``rule.monitor``, best first; ties go to the later commit."""
    return [info for info, _ in _ranked(_in_commit_order(checkpoints), rule)]


def best_rule(
    rules: Sequence[BestRule],
    monitor: str | None,
    mode: Mode | None,
    saved: Callable[[], Sequence[BestRule]] = tuple,
) -> BestRule:
    """The rule to find the best checkpoint by: ``monitor``, or the first metric of the configured ``rules``.

    The mode is the one given, else the configured one, else what the name says. Where that leaves something open,
    ``saved`` gives the rules that the run was last saved with: they come after the configured ones, before the name.

    Raises:
        ConfigError: there is no metric, or nothing says whether lower or higher is better.
    """
    configured = _rule_for(monitor, rules)
    if configured is None and (monitor is None or mode is None):
        configured = _rule_for(monitor, saved())
    if monitor is None and configured is None:
        raise ConfigError("name a metric: best('val_loss'), or configure keep: best")
    name = configured.monitor if configured else monitor
    if not isinstance(name, str):
        raise ConfigError(f"the name of a metric must be a string, got {shown(name)}")
    resolved = resolve_mode(name, mode, configured.mode if configured else None)
    if resolved is None:
        raise ConfigError(
            f"the name {name!r} does not say whether lower or higher is better: give mode='min' or mode='max', for "
            f"example best({name!r}, mode='max'), or configure keep: best"
        )
    return BestRule(monitor=name, mode=resolved)


def _rule_for(monitor: str | None, rules: Sequence[BestRule]) -> BestRule | None:
    return next((rule for rule in rules if monitor in (None, rule.monitor)), None)


# One pass


def _decide(
    infos: Sequence[CheckpointInfo],
    policy: KeepPolicy,
    now: datetime,
    spared: _Spared,
    stuck: Mapping[str, str],
) -> tuple[list[Decision], list[Decision]]:
    """Apply the protections, the rules and the budget once, to checkpoints in commit order."""
    protections = list(_protections(infos, policy, spared))
    reasons = _collect(protections, _rules(infos, policy, now), _stuck(infos, stuck, policy))
    candidates = [info for info in infos if _order(info) in reasons and info.id not in stuck]
    over = {_order(info) for info in _over_budget(candidates, _collect(protections), policy.max_size)}
    kept: list[Decision] = []
    dropped: list[Decision] = []
    for info in infos:
        key = _order(info)
        if key in over:
            dropped.append((info, (f"over max_size {format_size(policy.max_size or 0)}",)))
        elif key in reasons:
            kept.append((info, reasons[key]))
        else:
            dropped.append((info, _why_not(info, policy)))
    return kept, dropped


def _collect(*votes: _Votes) -> dict[_Order, Reasons]:
    """The reasons to keep, for each checkpoint that has one."""
    reasons: dict[_Order, Reasons] = {}
    for source in votes:
        for info, reason in source:
            found = reasons.get(_order(info), ())
            if reason not in found:
                reasons[_order(info)] = (*found, reason)
    return reasons


def _why_not(info: CheckpointInfo, policy: KeepPolicy) -> Reasons:
    if info.finite is False:
        return ("holds NaN or infinity: no rule counts it",)
    # A misspelled monitor removes more than was meant; this is where its user finds out.
    silent = (rule.monitor for rule in policy.best if _metric(info, rule.monitor) is None)
    return ("no rule keeps it", *(f"no finite {monitor} reported" for monitor in dict.fromkeys(silent)))


def _waits(usable: Sequence[CheckpointInfo], policy: KeepPolicy) -> bool:
    """Whether nothing tells which checkpoints are meant to stay: ``best`` rules alone, and no value to go by yet.

    To remove all but the newest then is what no rule asks for; a name with a typing error would cost the run.
    """
    if not policy.best or policy.last or policy.every_n_steps or policy.every or policy.within:
        return False
    return not any(_ranked(usable, rule) for rule in policy.best)


# What the metrics' names make one doubt


@dataclass(frozen=True)
class Doubt:
    """Why a ``best`` rule probably does not go by the metric that was meant."""

    monitor: str
    kind: str
    """``"never"``: no checkpoint reports a finite value; ``"renamed"``: none does any more, and a new name has come;
    ``"silent"``: none has for long, and other metrics are reported."""
    message: str
    withholds: bool = False
    """Whether nothing is removed for this reason."""


PATIENCE = 10
"""Commits in a row without a monitor, while they report other metrics, until that is said: who validates at each tenth
save, or annotates nine saves later, hears nothing; a run that lasts for days hears of it within the hour."""


def doubts(
    checkpoints: Iterable[CheckpointInfo], policy: KeepPolicy, *, silent_since: Mapping[str, int] | None = None
) -> list[Doubt]:
    """What is doubtful about the ``best`` rules of ``policy``, to be said before anything is removed.

    ``silent_since`` gives for monitors the sequence of the last commit that is known to have reported it, or of the
    first that this process has seen; those that reported it meanwhile may have been removed.
    """
    infos = _in_commit_order(checkpoints)
    waits = _waits([info for info in infos if info.usable], policy)
    found: dict[str, Doubt | None] = {}
    for rule in policy.best:
        found[rule.monitor] = (
            _never_reported(infos, rule.monitor, waits=waits)
            or _renamed(infos, rule.monitor)
            or _silent(infos, rule.monitor, (silent_since or {}).get(rule.monitor))
        )
    return [doubt for doubt in found.values() if doubt is not None]


def _never_reported(infos: Sequence[CheckpointInfo], monitor: str, *, waits: bool) -> Doubt | None:
    if any(_metric(info, monitor) is not None for info in infos if info.usable):
        return None
    if any(monitor in info.metrics for info in infos):
        what = "of which no checkpoint that is whole and free of NaN has reported a finite value"
    else:
        names = {name for info in infos for name in info.metrics}
        nearest = nearest_name(monitor, names)
        hint = f"; did you mean {nearest}?)" if nearest else ")"
        what = f"which no checkpoint has reported (reported: {listed(names)}{hint}"
    then = (
        "No other rule is set, so nothing is removed until one reports it, and the disk fills"
        if waits
        else "So this rule keeps no checkpoint, and what no other rule keeps is removed"
    )
    return Doubt(
        monitor,
        "never",
        f"keep: best goes by {monitor!r}, {what}. {then}. Give it to save(step, metrics={{{monitor!r}: ...}}), or to "
        "annotate() later, or correct monitor:",
        withholds=waits,
    )


def _renamed(infos: Sequence[CheckpointInfo], monitor: str) -> Doubt | None:
    """Only where a name has come up that was unknown as long as ``monitor`` was reported: not every save evaluates."""
    last = max((index for index, info in enumerate(infos) if monitor in info.metrics), default=None)
    if last is None:
        return None
    known = {name for info in infos[: last + 1] for name in info.metrics}
    nearest = nearest_name(monitor, {name for info in infos[last + 1 :] for name in info.metrics} - known)
    if nearest is None:
        return None
    return Doubt(
        monitor,
        "renamed",
        f"keep: best goes by {monitor!r}, which was last reported at step {infos[last].step}; since then "
        f"{nearest!r} is reported. If that is the same metric, this rule passes over all newer checkpoints: correct "
        "monitor:, or the name given to save()",
    )


def _silent(infos: Sequence[CheckpointInfo], monitor: str, since: int | None) -> Doubt | None:
    """Where many commits in a row have reported other metrics alone, whatever an old survivor reported."""
    if since is None or infos[-1].sequence - since < PATIENCE:
        return None
    last = max((info.sequence for info in infos if monitor in info.metrics), default=since)
    names = {name for info in infos if info.sequence > max(last, since) for name in info.metrics}
    if not names:
        return None
    nearest = nearest_name(monitor, names)
    hint = f"; did you mean {nearest}?)" if nearest else ")"
    return Doubt(
        monitor,
        "silent",
        f"keep: best goes by {monitor!r}, which none of the last {infos[-1].sequence - since} commits has reported "
        f"(reported: {listed(names)}{hint}. This rule passes over them: correct monitor:, or the name given to save()",
    )


# What is never removed


def _protections(infos: Sequence[CheckpointInfo], policy: KeepPolicy, spared: _Spared) -> _Votes:
    yield from _damaged(infos)
    yield from _newest(infos)
    for ids, reason in spared:
        yield from ((info, reason) for info in infos if info.id in ids)
    yield from ((info, "pinned") for info in infos if info.pinned)
    for rule in policy.best:
        yield from _best(infos, rule, top=1)


def _damaged(infos: Sequence[CheckpointInfo]) -> _Votes:
    # What is unreadable today may be readable once the disk or the mount is repaired; deleting it is for people.
    return ((info, "damaged: never removed automatically") for info in infos if info.damaged is not None)


def _stuck(infos: Sequence[CheckpointInfo], stuck: Mapping[str, str], policy: KeepPolicy) -> _Votes:
    uncounted = " (so max_size does not count it)" if policy.max_size is not None else ""
    return ((info, f"cannot be removed{uncounted}: {stuck[info.id]}") for info in infos if info.id in stuck)


def _newest(infos: Sequence[CheckpointInfo]) -> _Votes:
    intact = [info for info in infos if info.damaged is None]
    usable = [info for info in infos if info.usable]
    if intact:
        yield intact[-1], "newest commit"
    if usable and usable[-1] is not intact[-1]:
        yield usable[-1], "newest finite commit"


# The rules: each yields the checkpoints that it keeps


def _rules(infos: Sequence[CheckpointInfo], policy: KeepPolicy, now: datetime) -> _Votes:
    """Every rule's votes. Rules see usable checkpoints only, so that no other can take a place in them."""
    if not policy.has_rules:
        yield from ((info, "no retention rule set") for info in infos)
        return
    usable = [info for info in infos if info.usable]
    if policy.last is not None:
        yield from _last(usable, policy.last)
    if _waits(usable, policy):
        names = " or ".join(dict.fromkeys(rule.monitor for rule in policy.best))
        yield from ((info, f"kept until a checkpoint reports {names}") for info in usable)
    for rule in policy.best:
        yield from _best(usable, rule, top=rule.k)
    if policy.every_n_steps is not None:
        yield from _every_n_steps(usable, policy.every_n_steps)
    if policy.every is not None:
        yield from _every(usable, policy.every)
    if policy.within is not None:
        yield from _within(usable, policy.within, now)


def _last(usable: Sequence[CheckpointInfo], n: int) -> _Votes:
    return ((info, f"last {n}") for info in usable[-n:])


def _best(infos: Sequence[CheckpointInfo], rule: BestRule, *, top: int) -> _Votes:
    for info, value in _ranked(infos, rule)[:top]:
        yield info, f"best {rule.k} by {rule.monitor} ({rule.mode}): {value:g}"


def _every_n_steps(usable: Sequence[CheckpointInfo], n: int) -> _Votes:
    return ((info, f"step divisible by {n}") for info in usable if info.step % n == 0)


def _every(usable: Sequence[CheckpointInfo], every: timedelta) -> _Votes:
    # The absolute difference: after a clock was set back, or a run moved to a host whose clock is behind, `created`
    # lies before the last one kept, and the rule would otherwise keep nothing until the clock has caught up.
    anchor: datetime | None = None
    for info in usable:
        if anchor is None or abs(info.created - anchor) >= every:
            anchor = info.created
            yield info, f"every {format_duration(every)}"


def _within(usable: Sequence[CheckpointInfo], within: timedelta, now: datetime) -> _Votes:
    # A date in the future is a clock that was wrong, not an old checkpoint: it counts as young.
    return ((info, f"within {format_duration(within)}") for info in usable if now - info.created < within)


# The budget


def _over_budget(
    infos: Sequence[CheckpointInfo], protected: Collection[_Order], max_size: int | None
) -> list[CheckpointInfo]:
    """Those of ``infos`` that must go so that the rest fits, oldest first, those with NaN before all others.

    Damaged checkpoints do not count, since they cannot be removed. Protected ones with NaN count only against others
    with NaN: otherwise a run that diverges would push its good checkpoints out of the budget one by one.
    """
    if max_size is None:
        return []
    intact = [info for info in infos if info.damaged is None]
    usable = [info for info in intact if info.usable]
    removable = [info for info in intact if _order(info) not in protected]
    return [
        *_until_fits((info for info in removable if not info.usable), intact, max_size),
        *_until_fits((info for info in removable if info.usable), usable, max_size),
    ]


def _until_fits(
    candidates: Iterable[CheckpointInfo], counted: Sequence[CheckpointInfo], max_size: int
) -> Iterator[CheckpointInfo]:
    """Candidates to remove until those ``counted`` fit. What several share is freed when the last of them goes."""
    left: dict[Any, Counter[int]] = {}
    for info in counted:
        for copy, taken in _copies(info).items():
            left.setdefault(copy, Counter())[taken] += 1
    total = physical_size(counted)
    for info in candidates:
        if total <= max_size:
            return
        for copy, taken in _copies(info).items():
            total -= max(left[copy])
            left[copy][taken] -= 1
            if not left[copy][taken]:
                del left[copy][taken]
            total += max(left[copy], default=0)
        yield info


def physical_size(checkpoints: Iterable[CheckpointInfo]) -> int:
    """Bytes that ``checkpoints`` take together: what several of them lie on counts once, at the largest number."""
    sizes: dict[object, int] = {}
    for info in checkpoints:
        for copy, taken in _copies(info).items():
            sizes[copy] = max(taken, sizes.get(copy, 0))
    return sum(sizes.values())


def _copies(info: CheckpointInfo) -> Mapping[Any, int]:
    return info.copies or {_order(info): info.size}


# Helpers


def _order(info: CheckpointInfo) -> _Order:
    """Commit order, total even for made-up checkpoints that share a sequence; also what tells two of them apart."""
    return (info.sequence, info.created, info.step, info.id, info.path)


def _in_commit_order(checkpoints: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
    unique: dict[_Order, CheckpointInfo] = {}
    for info in sorted(checkpoints, key=_order):
        twin = unique.setdefault(_order(info), info)
        if twin is not info:
            unique[_order(info)] = min(twin, info, key=_carefully)
    return list(unique.values())


def _carefully(info: CheckpointInfo) -> tuple[object, ...]:
    """Of two entries for one checkpoint that disagree (one was listed before it was pinned), the most careful first."""
    return (info.damaged is None, not info.pinned, info.usable, repr(info))


def _ranked(infos: Sequence[CheckpointInfo], rule: BestRule) -> list[tuple[CheckpointInfo, float]]:
    """See :func:`rank`; ``infos`` in commit order."""
    # NaN, infinity and missing values are never best: a diverged run must not hold on to its worst checkpoint.
    values = [(info, _metric(info, rule.monitor)) for info in reversed(infos) if info.usable]
    sign = 1 if rule.mode == "min" else -1
    return sorted(((info, value) for info, value in values if value is not None), key=lambda pair: sign * pair[1])


def _metric(info: CheckpointInfo, monitor: str) -> float | None:
    """The metric's value, ``None`` where missing or not finite."""
    value = info.metrics.get(monitor)
    try:
        return float(value) if value is not None and math.isfinite(value) else None
    except (TypeError, OverflowError):  # not a number, or an integer beyond every float
        return None


def _best_rules(value: object) -> tuple[BestRule, ...]:
    """The ``best`` argument in any of its spellings, as rules. Errors name the item: ``best[0].mode``."""
    if value is None:
        return ()
    if isinstance(value, Mapping | BestRule):
        return (_best_rule(("best",), value),)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(_best_rule(("best", index), item) for index, item in enumerate(value))
    raise FieldError(("best",), f"must look like {{k: 2, monitor: val_loss, mode: min}}, got {shown(value)}")


def _best_rule(key: tuple[str | int, ...], value: object) -> BestRule:
    if isinstance(value, BestRule):
        return value
    if not isinstance(value, Mapping):
        raise FieldError(key, f"must look like {{k: 2, monitor: val_loss, mode: min}}, got {shown(value)}")
    try:
        refuse_unknown(value, [field.name for field in fields(BestRule)])
        return BestRule(**{"monitor": None, **value})
    except FieldError as error:
        raise error.under(*key) from None


__all__ = [
    "BestRule",
    "Decision",
    "Doubt",
    "KeepPolicy",
    "Mode",
    "RetentionPlan",
    "best_rule",
    "doubts",
    "physical_size",
    "plan",
    "rank",
]
