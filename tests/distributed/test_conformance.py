"""The DCP plug-ins against what PyTorch asks of storage. All cases of one number of ranks share a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.conformance import FOUR_RANKS, ONE_PROCESS, TWO_RANKS, Case, run_cases
from tests.ranks import run


@pytest.mark.parametrize("ranks, cases", [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_the_ranks_save_and_load_whatever_pytorch_asks_of_storage(tmp_path: Path, ranks: int, cases: Sequence[Case]):
    for rank, failed in enumerate(run(ranks, run_cases, cases, str(tmp_path))):
        assert not failed, "\n".join(f"{name} on rank {rank}\n{trace}" for name, trace in failed.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # DCP's own
@pytest.mark.parametrize("case", ONE_PROCESS, ids=lambda case: case.__name__)
def test_so_does_a_process_without_a_process_group(tmp_path: Path, case: Case):
    case(str(tmp_path))
