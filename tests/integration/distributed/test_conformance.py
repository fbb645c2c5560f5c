"""The DCP plug-ins against what PyTorch asks of storage. All cases of one number of ranks share a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.distributed.conformance import background, failures, loading, meshes, sharding, values
from tests.integration.distributed.conformance.calls import Case, run_cases
from tests.support.ranks import run

TWO_RANKS = [*sharding.CASES, *values.CASES, *loading.CASES, *failures.CASES, *background.CASES]

ONE_PROCESS: Sequence[Case] = [
    values.values_that_are_no_tensors_replace_those_in_the_state,
    values.a_state_without_anything_in_it_is_a_checkpoint_too,
    loading.a_part_of_the_keys_is_loaded_and_missing_ones_are_named,
    loading.a_tensor_of_another_shape_or_kind_is_refused,
    loading.keys_are_loaded_without_a_state_to_load_into,
    failures.one_writer_and_one_reader_serve_many_times,
    failures.a_save_that_fails_anywhere_fails_on_all_ranks_and_commits_nothing,
    failures.a_load_that_fails_anywhere_fails_on_all_ranks,
    failures.a_place_without_a_checkpoint_is_an_error,
]
"""Those that need no process group."""


@pytest.mark.parametrize("ranks, cases", [(2, TWO_RANKS), (4, meshes.CASES)], ids=["two", "four"])
def test_all_ranks_save_and_load_whatever_pytorch_asks_of_storage(tmp_path: Path, ranks: int, cases: Sequence[Case]):
    for rank, failed in enumerate(run(ranks, run_cases, cases, str(tmp_path))):
        assert not failed, "\n".join(f"{name} on rank {rank}\n{trace}" for name, trace in failed.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # DCP's own
@pytest.mark.parametrize("case", ONE_PROCESS, ids=lambda case: case.__name__)
def test_so_does_a_process_without_a_process_group(tmp_path: Path, case: Case):
    case(str(tmp_path))
