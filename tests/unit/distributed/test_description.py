"""What a rank tells of its state: the same where ranks have the same, by real modules, optimizers and DTensors.

Jobs of several ranks are simulated in this process, by a process group of torch that sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, debug
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpointer.distributed.description import Describer, Description, Section
from checkpointer.errors import UnsupportedStateError
from checkpointer.format.layouts import Cut
from checkpointer.state.adapters import adapter_for, capture_all, modules_of
from checkpointer.state.dtensor import sharding_of
from checkpointer.state.protocol import Captured


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    debug._clear_sharding_prop_cache()  # results of operators carry the mesh of the rank that they were computed for
    try:
        yield
    finally:
        dist.destroy_process_group()


def captured(**components: object) -> dict[str, Captured]:
    modules = modules_of(components)
    return capture_all({name: adapter_for(name, part, modules) for name, part in components.items()})


def described(**components: object) -> Description:
    return Describer().describe(captured(**components))


def on_each(world: int, work: Callable[[], Description]) -> list[Description]:
    found = []
    for rank in range(world):
        with rank_of(rank, world):
            found.append(work())
    return found


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with moments, on the parameters of which this rank holds a part."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        if not (isinstance(parameter, DTensor) and parameter.device_mesh.get_coordinate() is None):
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def sharded(shape: Sequence[int], mesh: DeviceMesh, places: Sequence[Placement], held: Sequence[int]) -> DTensor:
    stride = torch.empty(*shape, device="meta").stride()
    return DTensor.from_local(torch.zeros(*held), mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)


def by_sort(found: Description) -> dict[tuple[str, str], Section]:
    return {(section.component, section.sort): section for section in found.sections}


def names(section: Section) -> list[str]:
    return [entry.name for entry in section.entries]


def test_ranks_with_equal_modules_and_optimizers_say_the_same():
    def work() -> Description:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        return described(model=model, optimizer=trained(model))

    a, b = on_each(2, work)
    assert [section.digest for section in a.sections] == [section.digest for section in b.sections]
    assert a.digest == b.digest
    found = by_sort(a)
    assert names(found["model", "plain"]) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert names(found["model", "own"]) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert "state.model.0.weight.exp_avg" in names(found["optimizer", "plain"])


def wide() -> nn.Module:
    return nn.Linear(3, 5)


def half() -> nn.Module:
    return nn.Linear(3, 4).to(torch.bfloat16)


def other_name() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4))


def partly_frozen() -> nn.Module:
    module = nn.Linear(3, 4)
    module.bias.requires_grad_(False)
    return module


@pytest.mark.parametrize("other", [wide, half, other_name, partly_frozen])
def test_what_differs_is_told_differently(other):
    assert described(model=nn.Linear(3, 4)).digest != described(model=other()).digest


def test_the_order_of_registration_and_of_keys_does_not_matter():
    first, last = nn.Linear(2, 2), nn.Linear(2, 3)
    a = described(model=nn.ModuleDict({"a": first, "b": last}), other=nn.Linear(1, 1))
    b = described(other=nn.Linear(1, 1), model=nn.ModuleDict({"b": last, "a": first}))
    assert {section.digest for section in a.sections} == {section.digest for section in b.sections}


def test_parameters_of_an_optimizer_in_another_order_are_told_though_their_shapes_are_equal():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    weights = list(model.parameters())
    told = [described(model=model, optimizer=torch.optim.SGD(order)) for order in (weights, weights[::-1])]
    assert by_sort(told[0])["optimizer", "plain"].digest != by_sort(told[1])["optimizer", "plain"].digest


def test_state_of_parameters_without_names_goes_by_number():
    weights = [nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.AdamW(weights)
    weights[0].grad = torch.zeros(2)
    optimizer.step()
    assert names(by_sort(described(optimizer=optimizer))["optimizer", "plain"]) == [
        "state.0.exp_avg",
        "state.0.exp_avg_sq",
        "state.0.step",
    ]


# ------------------------------------------------------------------------------------ DTensors


def test_hsdp_is_told_by_its_mesh_and_differs_over_ranks_in_the_cell_alone():
    def work() -> Description:
        mesh = init_device_mesh("cpu", (2, 2))
        model = nn.Linear(3, 4, bias=False)
        model.weight = nn.Parameter(sharded((4, 3), mesh, [Replicate(), Shard(0)], (2, 3)))
        return described(model=model, optimizer=trained(model))

    found = [by_sort(one)["optimizer", "mesh"] for one in on_each(4, work)]
    assert len({section.digest for section in found}) == 1
    assert [(section.mesh, section.cell) for section in found] == [((2, 2), cell) for cell in range(4)]
    assert len({section.group for section in found}) == 1
    cuts = {entry.name.rpartition(".")[2]: entry.cuts for entry in found[0].entries}
    assert cuts == {"exp_avg": (Cut(1, 0),), "exp_avg_sq": (Cut(1, 0),), "step": ()}  # the step count is with them


def test_meshes_of_tensor_parallelism_beside_each_other_have_one_digest_and_differ_in_the_group():
    def work() -> Description:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
        model = nn.Linear(3, 4, bias=False)
        model.weight = nn.Parameter(sharded((4, 3), mesh, [Shard(0)], (2, 3)))
        return described(model=model)

    found = [by_sort(one)["model", "mesh"] for one in on_each(4, work)]
    assert len({section.digest for section in found}) == 1
    assert [section.cell for section in found] == [0, 1, 0, 1]
    assert found[0].group == found[1].group != found[2].group == found[3].group


def test_meshes_with_the_same_first_rank_are_told_apart():
    with rank_of(0, 4):
        places = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 2])]
        found = described(state={str(n): sharded((4,), mesh, [Shard(0)], (2,)) for n, mesh in enumerate(places)})
    meshes = [section for section in found.sections if section.sort == "mesh"]
    assert len(meshes) == 2
    assert meshes[0].group != meshes[1].group


def test_meshes_of_the_same_ranks_and_other_sizes_are_told_apart():
    with rank_of(0, 4):
        line, table = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        state = {"line": sharded((4,), line, [Shard(0)], (1,)), "table": sharded((4,), table, [Shard(0)] * 2, (1,))}
        found = [section for section in described(state=state).sections if section.sort == "mesh"]
    assert [section.mesh for section in found] == [(4,), (2, 2)]


def test_a_rank_outside_a_mesh_says_the_same_as_those_inside_of_all_but_the_mesh():
    def work() -> Description:
        mesh = DeviceMesh("cpu", [1, 2])
        held = (0,) if mesh.get_coordinate() is None else (2, 3)
        model = nn.ModuleDict({"in": nn.Linear(3, 4, bias=False), "plain": nn.Linear(2, 2)})
        model["in"].weight = nn.Parameter(sharded((4, 3), mesh, [Shard(0)], held))
        return described(model=model, optimizer=trained(model))

    found = [by_sort(one) for one in on_each(4, work)]
    for component in ("model", "optimizer"):
        assert len({sections[component, "plain"].digest for sections in found}) == 1
        assert [(component, "mesh") in sections for sections in found] == [False, True, True, False]


def test_what_fsdp_over_tensor_parallelism_holds_is_told_by_the_order_of_cuts():
    with rank_of(1, 4):
        mesh = init_device_mesh("cpu", (2, 2))
        found = sharding_of(sharded((8, 3), mesh, [_StridedShard(0, split_factor=2), Shard(0)], (2, 3)))
    assert found.form.cuts == (Cut(1, 0), Cut(0, 0))
    assert found.box((8, 3)).offsets == (4, 0)


@pytest.mark.parametrize(
    "places,held,told",
    [
        ([_StridedShard(0, split_factor=2), Replicate()], (4, 3), "is no box of it"),
        ([Shard(0), _StridedShard(0, split_factor=2)], (2, 3), "is no box of it"),
        ([_StridedShard(0, split_factor=3), Shard(0)], (2, 3), "is no box of it"),
        ([Partial(), Shard(0)], (4, 3), "waits for a reduction"),
        ([Shard(0), Replicate()], (3, 3), r"this rank holds \[3, 3\] of a DTensor .* should hold \[4, 3\]"),
    ],
)
def test_a_dtensor_whose_part_is_no_box_is_refused_by_name(places, held, told):
    with rank_of(0, 4):
        state = {"w": sharded((8, 3), init_device_mesh("cpu", (2, 2)), places, held)}
        with pytest.raises(UnsupportedStateError, match=rf"state\..*w.*: .*{told}"):
            described(state=state)


def test_more_cuts_than_a_checkpoint_can_tell_are_refused():
    with rank_of(0, 32):
        mesh = DeviceMesh("cpu", torch.arange(32).reshape(2, 2, 2, 2, 2), _init_backend=False)
        with pytest.raises(UnsupportedStateError, match=r"state\..*w.*is cut along 5 dimensions"):
            described(state={"w": sharded((32,), mesh, [Shard(0)] * 5, (1,))})


@pytest.mark.parametrize("rank,length,told", [(0, 3, True), (1, 3, True), (18, 1, False)])
def test_a_part_that_torch_places_elsewhere_than_fsdp_holds_it_is_refused(rank, length, told):
    """49 rows, cut by 4 and then by 5: rank 18 holds one row by either arithmetic, and not the same one."""
    with rank_of(rank, 20):
        places = [_StridedShard(0, split_factor=4), Shard(0)]
        uneven = sharded((49, 1), init_device_mesh("cpu", (5, 4)), places, (length, 1))
        if told:
            assert sharding_of(uneven).box((49, 1)).lengths == (length, 1)
        else:
            with pytest.raises(UnsupportedStateError, match="cut unevenly"):
                sharding_of(uneven)


# ------------------------------------------------------------------------------------ what is as it was


def test_what_has_not_changed_is_not_described_again():
    model = nn.Linear(3, 4)
    optimizer = trained(model)
    describer = Describer()
    first = describer.describe(captured(model=model, optimizer=optimizer))
    assert describer.describe(captured(model=model, optimizer=optimizer)) is first


@pytest.mark.parametrize(
    "change",
    [
        lambda model, _: model.to(torch.bfloat16),
        lambda model, _: model.bias.requires_grad_(False),
        lambda model, _: model.register_buffer("mask", torch.ones(1)),
        lambda _, optimizer: optimizer.state.clear(),
        lambda _, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    ],
)
def test_every_change_is_described(change):
    model = nn.Linear(3, 4)
    optimizer = trained(model)
    describer = Describer()
    before = describer.describe(captured(model=model, optimizer=optimizer)).digest
    change(model, optimizer)
    assert describer.describe(captured(model=model, optimizer=optimizer)).digest != before


def test_a_dtensor_that_is_redistributed_is_described_again():
    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        describer = Describer()
        rows = describer.describe(captured(state={"w": sharded((4, 4), mesh, [Shard(0)], (2, 4))}))
        columns = describer.describe(captured(state={"w": sharded((4, 4), mesh, [Shard(1)], (4, 2))}))
    assert rows.digest != columns.digest


def test_a_declared_parameter_is_marked_with_its_optimizer_state():
    model = nn.ModuleDict({"embed": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    found = Describer({"model": ["embed.*"]}).describe(captured(model=model, optimizer=trained(model)))
    declared = {entry.name for section in found.sections for entry in section.entries if entry.declared}
    slots = {f"state.model.embed.weight.{slot}" for slot in ("exp_avg", "exp_avg_sq", "step")}
    assert declared == {"embed.weight", *slots}
