#!/bin/sh
# PID 1 of a guest of User-Mode Linux whose root is the host's, read-only. What it writes lies below /run, in memory.
# SHARE, a folder of the host that is written through, PYTHON, REPOSITORY and PART come from the command line of its kernel.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/run/tmp TMPDIR=/run/tmp OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
mount -t proc none /proc
mount -t sysfs none /sys
mount -t tmpfs none /run
mkdir -p /run/tmp /run/share /run/modules/lib
ln -s /usr/lib/uml/modules /run/modules/lib/modules
mount -t hostfs -o "$SHARE" none /run/share
cd "$REPOSITORY" || exit
"$PYTHON" -m tests.campaign.crash.power.uml_guest "$PART" >/run/share/output 2>&1
echo o >/proc/sysrq-trigger
sleep 60
