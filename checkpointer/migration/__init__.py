"""From hand-made ``torch.save`` files to checkpoints, and back."""

from __future__ import annotations

from checkpointer.migration.exporting import Exported, export_checkpoint
from checkpointer.migration.importing import Imported, import_checkpoint
from checkpointer.migration.naming import ImportPlan, Part, plan_import

__all__ = ["Exported", "ImportPlan", "Imported", "Part", "export_checkpoint", "import_checkpoint", "plan_import"]
