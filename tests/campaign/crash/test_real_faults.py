"""File systems that are really full, read-only or broken, and limits that are really reached."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from tempfile import TemporaryDirectory

import pytest

from tests.campaign.crash import program
from tests.campaign.crash.real_faults import SCENARIOS

PROGRAM = "python -m tests.campaign.crash.real_faults FOLDER"

ISOLATED = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])
"""Where a program mounts what nobody else sees: as root, and as a user whom the kernel lets."""

Outcome = Mapping[str, str]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Sequence[Outcome]]:
    """What one run of the program says of each scenario, with ``--thorough`` in each mode."""
    modes = ["--every-mode"] if request.config.getoption("--thorough") else []
    with TemporaryDirectory(prefix="faults-") as folder:
        os.chmod(folder, 0o755)  # one scenario gives up being root
        done = program.run("tests.campaign.crash.real_faults", folder, *modes, within=isolation())
        assert done.returncode == 0, done.stdout + done.stderr
        yield [json.loads(line) for line in done.stdout.splitlines()]


@functools.cache
def isolation() -> Sequence[str]:
    """What lets a program mount file systems of its own; empty where nothing does."""
    for command in ISOLATED:
        mounts = [*command, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
        try:
            if subprocess.run(mounts, capture_output=True, check=False).returncode == 0:
                return command
        except FileNotFoundError:
            return ()
    return ()


@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits of Linux")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_fails_is_a_typed_error_training_goes_on_and_so_does_saving_when_the_cause_is_gone(outcomes, scenario):
    own = [outcome for outcome in outcomes if outcome["scenario"] == scenario]
    assert own
    for outcome in own:
        assert outcome["outcome"] in ("ok", "unavailable"), f"{outcome['mode']}: {outcome['words']}"
    missing = {outcome["words"] for outcome in own if outcome["outcome"] == "unavailable"}
    if missing:
        reason = f"not possible here ({'; '.join(sorted(missing))}). As root, outside a container: {PROGRAM} {scenario}"
        assert not must_work(missing), reason
        pytest.skip(reason)


def must_work(reasons: set[str]) -> bool:
    """In CI, as root with loop devices at hand, only the lack of a kernel's or a container's permission is a reason."""
    known = (
        "permission denied",
        "not permitted",
        "failed to setup loop device",
        "unknown filesystem",
        "must be superuser",
    )
    if not os.environ.get("CI") or os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        return False
    return not all(any(word in reason.lower() for word in known) for reason in reasons)
