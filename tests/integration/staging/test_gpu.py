"""State on a GPU: exact in every mode, copied beside training, and restored into the GPU's memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.errors import SaveError
from checkpointer.staging import gpu
from checkpointer.staging.gpu import Transfer, Transfers
from checkpointer.system.memory import Region
from tests.support.compare import assert_identical

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODES = ["sync", "async", "lazy"]
MIB = 1 << 20


class Run:
    """A model on the GPU whose copies take long enough for a step to come in between."""

    def __init__(self, *, seed: int = 0, width: int = 512, fused: bool = False, device: str = "cuda") -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width)
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.scaler = torch.amp.GradScaler(device)
        self.progress: dict[str, Any] = {"seen": torch.zeros(1000, device=device)}
        self._inputs = torch.randn(16, width, generator=torch.Generator().manual_seed(7)).to(device)

    @property
    def components(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def backward(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self._inputs.device.type, torch.float16):
            loss = self.model(self._inputs).square().mean()
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        self.backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.progress["seen"] += 1

    def snapshot(self) -> Any:
        state = {name: value if name == "progress" else value.state_dict() for name, value in self.components.items()}
        state["random"] = torch.get_rng_state(), torch.cuda.get_rng_state()
        return copy.deepcopy(state)


def manager(root: Path, mode: str, run: Run, **more: Any) -> CheckpointManager:
    config = {"write": {"mode": mode, "durable": False}, "keep": {"last": 2}}
    return CheckpointManager(root, config=config, **run.components, **more)


def restored(root: Path, step: int, *, width: int = 512, fused: bool = False) -> Any:
    """What is in the checkpoint, by way of a run that knows nothing else. Leaves the random generators alone."""
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    run = Run(seed=1, width=width, fused=fused)
    with CheckpointManager(root, read_only=True, **run.components) as reader:
        reader.restore(step)
    found = run.snapshot()
    torch.set_rng_state(before[0])
    torch.cuda.set_rng_state(before[1])
    return found


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def busy() -> Callable[[], None]:
    """Gives the GPU work of half a second."""
    return lambda: torch.cuda._sleep(10**9)


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, mode, fused):
    run = Run(fused=fused)
    with manager(tmp_path, mode, run) as mgr:
        for step in range(6):
            run.step()
            mgr.save(step)
    for _ in range(5):
        run.step()

    again = Run(seed=1, fused=fused)
    with manager(tmp_path, mode, again) as mgr:
        found = mgr.restore_latest()
        assert found is not None
        assert found.step == 5
        for step in range(6, 11):
            again.step()
            mgr.save(step)
    assert_identical(again.snapshot(), run.snapshot())


@pytest.mark.parametrize("width", [512, 4096])
def test_what_is_restored_is_the_state_at_the_save_call_however_fast_training_goes_on(tmp_path, mode, width):
    run = Run(width=width, fused=True)
    run.step()
    with manager(tmp_path, mode, run) as mgr:
        for step in range(8):
            run.backward()
            expected = run.snapshot()
            handle = mgr.save(step)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.progress["seen"] += 1
            for _ in range(step % 3):
                run.step()
            handle.result()
            assert_identical(restored(tmp_path, step, width=width, fused=True), expected, f"step {step}")


def test_lazy_returns_before_the_gpu_has_copied_and_a_step_does_not_wait_either(tmp_path, busy):
    run = Run(width=2048, fused=True)
    run.step()
    del run.scaler  # its state_dict() waits for the GPU
    with manager(tmp_path, "lazy", run) as mgr:
        mgr.save(0).result()  # the memory is there from now on
        run.model(run._inputs).square().mean().backward()
        expected = run.snapshot()
        torch.cuda.synchronize()
        began = time.perf_counter()
        busy()
        queued = torch.cuda.Event()
        queued.record()
        handle = mgr.save(1)
        run.optimizer.step()
        still_busy = not queued.query()
        passed = time.perf_counter() - began
        handle.result()
    assert still_busy, passed
    target = Run(seed=1, width=2048, fused=True)
    del target.scaler
    with manager(tmp_path, "lazy", target) as mgr:
        mgr.restore(1)
    assert_identical(target.snapshot(), expected)


def test_the_test_of_torn_state_fails_where_steps_are_not_ordered_after_the_copies(tmp_path, busy, monkeypatch):
    monkeypatch.setattr(Transfers, "order_before_changes", lambda _: None)
    run = Run(width=4096, fused=True)
    run.step()
    with manager(tmp_path, "lazy", run) as mgr:
        mgr.save(0).result()
        run.backward()
        expected = run.snapshot()
        stream = torch.cuda.Stream()
        monkeypatch.setattr(gpu, "side_stream", lambda _: stream)
        with torch.cuda.stream(stream):
            busy()  # so the copies begin late
        handle = mgr.save(1)
        run.optimizer.step()
        handle.result()
    with pytest.raises(AssertionError):
        assert_identical(restored(tmp_path, 1, width=4096, fused=True), expected)


def test_parameters_may_change_by_hand_once_staged_has_returned(tmp_path):
    run = Run(width=4096)
    run.step()
    with manager(tmp_path, "lazy", run) as mgr:
        for step in range(4):
            expected = run.snapshot()
            handle = mgr.save(step)
            mgr.staged()
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.neg_()
            handle.result()
            assert_identical(restored(tmp_path, step, width=4096)["model"], expected["model"])


def test_parameters_changed_by_hand_while_they_are_copied_fail_the_save(tmp_path, busy, monkeypatch):
    run = Run(width=2048)
    run.step()
    with manager(tmp_path, "lazy", run) as mgr:
        mgr.save(0).result()
        stream = torch.cuda.Stream()
        monkeypatch.setattr(gpu, "side_stream", lambda _: stream)
        with torch.cuda.stream(stream):
            busy()
        handle = mgr.save(1)
        with torch.no_grad():
            run.model[0].weight.neg_()
        with pytest.raises(SaveError, match=r"model\.0\.weight"):
            handle.result()
        monkeypatch.undo()
        mgr.save(2).result()
        assert [info.step for info in mgr.checkpoints()] == [0, 2]


def test_a_save_that_fails_while_the_gpu_copies_leaves_the_memory_to_the_next_one_whole(tmp_path, busy, monkeypatch):
    run = Run(width=2048)
    run.step()
    with manager(tmp_path, "lazy", run) as mgr:
        mgr.save(0).result()
        with monkeypatch.context() as patched:
            patched.setattr(
                "checkpointer.save.saver.write_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(5, "no"))
            )
            handle = mgr.save(1)
            run.step()
            with pytest.raises(SaveError):
                handle.result()
        expected = run.snapshot()
        handle = mgr.save(2)
        run.step()
        handle.result()
    assert_identical(restored(tmp_path, 2, width=2048), expected)


def test_layouts_and_dtypes_of_all_kinds_come_back_to_the_gpu(tmp_path, mode):
    made = {
        "transposed": torch.randn(300, 500, device="cuda").t(),
        "channels_last": torch.randn(2, 8, 16, 16, device="cuda").to(memory_format=torch.channels_last),
        "conj": torch.randn(64, dtype=torch.complex64, device="cuda").conj(),
        "empty": torch.empty(0, 3, device="cuda"),
        "scalar": torch.tensor(1.5, device="cuda"),
        "bool": torch.rand(99, device="cuda") > 0.5,
        "float8": torch.randn(100, device="cuda").to(torch.float8_e4m3fn),
        "bfloat16": torch.randn(33, 7, device="cuda", dtype=torch.bfloat16),
        "large": torch.randint(255, (40 * MIB,), dtype=torch.uint8, device="cuda"),
        "large transposed": torch.randint(255, (5, MIB), device="cuda").t(),
        "on the CPU": torch.randn(10),
    }
    with CheckpointManager(tmp_path, config={"write": {"mode": mode}}, state=made) as mgr:
        mgr.save(1)
    found: dict[str, Any] = {}
    with CheckpointManager(tmp_path, read_only=True, state=found) as reader:
        reader.restore(1)
    assert {name: tensor.device for name, tensor in found.items()} == {n: t.device for n, t in made.items()}
    assert_identical({n: t.cpu() for n, t in found.items()}, {n: t.cpu() for n, t in made.items()})


def test_a_checkpoint_of_a_gpu_run_is_restored_on_the_cpu_and_the_other_way_round(tmp_path):
    for source, target in (("cuda", "cpu"), ("cpu", "cuda")):
        run, other = Run(device=source), Run(seed=1, device=target)
        run.backward()
        run.optimizer.step()
        parts = ("model", "optimizer")
        with CheckpointManager(tmp_path / source, **{name: run.components[name] for name in parts}) as mgr:
            mgr.save(1)
        with CheckpointManager(
            tmp_path / source, read_only=True, **{name: other.components[name] for name in parts}
        ) as reader:
            reader.restore(1)
        for one, two in zip(run.model.state_dict().values(), other.model.state_dict().values(), strict=True):
            assert two.device.type == target
            assert_identical(one.cpu(), two.cpu())
        for parameter in other.model.parameters():
            assert other.optimizer.state[parameter]["exp_avg"].device.type == target


def test_a_restore_takes_no_second_copy_of_the_state_on_the_gpu(tmp_path, mode):
    run = Run(width=4096)
    run.step()
    with manager(tmp_path, mode, run) as mgr:
        mgr.save(1)
        handle = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mgr.restore(1)
    assert torch.cuda.max_memory_allocated() - handle < 16 * MIB


def test_saves_take_no_memory_of_the_gpu(tmp_path, mode):
    run = Run(width=4096)
    run.step()
    with manager(tmp_path, mode, run) as mgr:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mgr.save(1).result()
        assert torch.cuda.max_memory_allocated() - before < 16 * MIB


def test_what_a_stream_of_the_callers_was_given_comes_before_a_save_and_before_a_restore(tmp_path, busy, mode):
    """The threads that read and write have another current stream, which does not wait for it."""
    run = Run()
    run.step()
    del run.scaler  # its state_dict() waits for the GPU
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), manager(tmp_path, mode, run) as mgr:
        busy()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(1)
        handle = mgr.save(1)
        assert handle is not None
        handle.result()
        expected = copy.deepcopy(run.model.state_dict())
        busy()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(1)
        mgr.restore(1)
        assert_identical(run.model.state_dict(), expected)


def test_capturable_optimizers_are_copied_when_save_is_called(tmp_path):
    run = Run()
    run.optimizer = torch.optim.AdamW(run.model.parameters(), capturable=True)
    run.step()
    with manager(tmp_path, "lazy", run) as mgr:
        expected = run.snapshot()["model"]
        handle = mgr.save(1)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.neg_()  # as a replayed graph does, without a hook
        handle.result()
        mgr.restore(1)
        assert_identical(run.snapshot()["model"], expected)


def test_transfers_begin_after_what_the_stream_was_given_before(busy):
    region = Region(4 * MIB)
    tensor = torch.zeros(MIB, device="cuda")
    busy()
    tensor += 7
    running = Transfers([Transfer(tensor, region.address)])
    running.order_before_changes()
    tensor += 1
    running.wait()
    assert running.done
    assert set(torch.frombuffer(region.view, dtype=torch.float32).tolist()) == {7.0}
