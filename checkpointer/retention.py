"""Which checkpoints stay: retention as a pure function that gives reasons. Public."""

from __future__ import annotations

from checkpointer.policy.retention import (
    BestRule,
    Doubt,
    KeepPolicy,
    RetentionPlan,
    best_rule,
    doubts,
    physical_size,
    plan,
    rank,
)

__all__ = ["BestRule", "Doubt", "KeepPolicy", "RetentionPlan", "best_rule", "doubts", "physical_size", "plan", "rank"]
