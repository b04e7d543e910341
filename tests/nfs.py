"""NFS as it is: a server and two clients in a Linux kernel of their own (user-mode-linux), which sees this machine's
files and runs a command there. Debian's packages user-mode-linux, nfs-kernel-server and kmod are needed, and root."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("linux.uml", "mkfs.ext4", "nsenter", "modprobe", "exportfs", "rpc.mountd", "rpc.nfsd")
MODULES = Path("/usr/lib/uml/modules")
DISK_BYTES = 256 * 2**20
"""Of the served file system: ext4, which counts changes. By a clock of 10 ms, as tmpfs has it, clients miss some."""
EXPORT = "rw,async,fsid=0,no_root_squash,no_subtree_check,insecure"
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /var/lib
mount -t ext4 /dev/ubda {folder}/served
mkdir -p /var/lib/nfs/v4recovery; touch /var/lib/nfs/etab
for module in veth nfsd nfs nfsv4; do modprobe -d {folder}/modules $module; done
mount -t nfsd nfsd /proc/fs/nfsd
exportfs -o {export} 10.0.0.0/8:{folder}/served
rpc.mountd -N 3 && rpc.nfsd -G 10 -L 10 -N 3 -V 4.2 4
echo Y > /proc/fs/nfsd/v4_end_grace
for host in 0 1; do
    ip netns add host-$host
    ip link add to-$host type veth peer name eth0 netns host-$host
    ip address add 10.0.$host.1/24 dev to-$host && ip link set to-$host up
    ip -n host-$host address add 10.0.$host.2/24 dev eth0 && ip -n host-$host link set eth0 up
    options=vers=4.2,actimeo={lag},addr=10.0.$host.1,clientaddr=10.0.$host.2
    nsenter --net=/run/netns/host-$host unshare --uts sh -c "hostname host-$host
        mount -i -t nfs4 -o $options 10.0.$host.1:/ {folder}/view-$host"
done
mountpoint {folder}/view-0 && mountpoint {folder}/view-1 && cd {root} && {command} > {folder}/said 2>&1
echo $? > {folder}/status
echo o > /proc/sysrq-trigger
sleep 60
"""


def missing_for_nfs() -> str | None:
    """Why NFS cannot be run here, or None."""
    if os.geteuid():
        return "mounting needs root"
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    return f"not installed: {', '.join(lacking) or MODULES}" if lacking or not MODULES.is_dir() else None


def run_on_nfs(folder: Path, lag_s: int, module: str, memory_gib: int = 2) -> str:
    """Run a module as `python -m MODULE VIEW VIEW`, each VIEW the same folder through an NFS mount of its own.

    Args:
        lag_s: how long a client trusts what it remembers (`actimeo`).

    Returns:
        what it printed, once it ended well.
    """
    for name in ("served", "view-0", "view-1", "modules/lib"):
        (folder / name).mkdir(parents=True)
    (folder / "modules/lib/modules").symlink_to(MODULES)
    words = [sys.executable, "-m", module, str(folder / "view-0"), str(folder / "view-1")]
    init = folder / "init"
    text = INIT.format(folder=folder, root=ROOT, lag=lag_s, export=EXPORT, command=shlex.join(words))
    init.write_text(text)
    init.chmod(0o755)
    disk = folder / "disk"
    with disk.open("wb") as stream:
        stream.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", str(disk)], check=True)
    kernel = ["linux.uml", f"mem={memory_gib}G", f"ubd0={disk}", "rootfstype=hostfs", "root=/dev/root", "rw",
              f"init={init}", "quiet", "con=null", "con0=null,fd:1"]  # fmt: skip
    done = subprocess.run(kernel, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)
    if "ptrace set fp regs failed" in done.stdout:
        pytest.skip("this processor has more registers than user-mode-linux can save: it starts no process")
    status, said = folder / "status", folder / "said"
    shown = done.stdout + (said.read_text() if said.exists() else "")
    assert status.exists() and status.read_text().strip() == "0", shown
    return shown
