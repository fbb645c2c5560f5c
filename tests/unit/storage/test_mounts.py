"""Which file systems give stamps that can be relied on."""

from __future__ import annotations

import pytest

from checkpointer.storage.mounts import LOCAL, _mounts_at

TABLE = rb"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:5 / /proc rw - proc proc rw
40 22 0:40 / /data rw - nfs4 server:/data rw
41 40 8:3 / /data/fast rw - xfs /dev/sdc rw
42 22 8:4 / /with\040space rw - ext4 /dev/sdd rw
43 22 0:50 / /twice rw - ext4 /dev/sde rw
44 43 0:51 / /twice rw - fuse.sshfs host:/ rw
"""


@pytest.mark.parametrize(
    "place, kind, below",
    [
        ("/home/run", "ext4", False),
        ("/data/run", "nfs4", False),
        ("/data", "nfs4", True),
        ("/data/fast/run", "xfs", False),
        ("/data/faster", "nfs4", False),
        ("/database", "ext4", False),
        ("/with space/run", "ext4", False),
        ("/twice/run", "fuse.sshfs", False),
        ("/", "ext4", True),
    ],
)
def test_the_nearest_mount_decides_and_one_below_is_seen(place: str, kind: str, below: bool) -> None:
    assert _mounts_at(place.encode(), TABLE) == (kind, below)


def test_a_table_that_makes_no_sense_promises_nothing() -> None:
    assert _mounts_at(b"/run", b"22 1\n") == (None, True)
    assert _mounts_at(b"/run", b"") == (None, False)


def test_no_file_system_of_another_host_or_of_a_program_counts_as_local() -> None:
    assert not any(kind.startswith(("nfs", "cifs", "smb", "fuse", "9p", "virtiofs", "vfat")) for kind in LOCAL)
