#!/usr/bin/env bash
# SLURM on one machine: srun's ranks are found; a job that SIGUSR1 ends with code 75 is requeued and goes on to the bit.
# `tests/clusters/slurm.sh [python]`
# Needs root, slurm-wlm and munge (apt-get install). The daemons live in a scratch folder and end with this script.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$(command -v "${1:-python}")
for program in slurmctld slurmd munged srun sbatch; do
    PATH=$PATH:/usr/sbin command -v $program >/dev/null || { echo "skipped: $program is not installed"; exit 0; }
done
[ "$(id -u)" = 0 ] || { echo "skipped: SLURM's daemons need root"; exit 0; }
export PATH=$PATH:/usr/sbin
host=$(hostname -s) scratch=$(mktemp -d)
chmod 755 "$scratch"; mkdir "$scratch/state" "$scratch/spool"
stop() {
    scancel --user root 2>/dev/null && sleep 3 || true  # its steps outlive the daemons
    for file in d ctld; do
        pid=$(cat "$scratch/$file.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
    done
    [ -z "${munge_pid:-}" ] || kill "$munge_pid" 2>/dev/null || true
    rm -rf "$scratch" 2>/dev/null || true
}
trap stop EXIT

if [ ! -S /run/munge/munge.socket.2 ]; then
    [ -f /etc/munge/munge.key ] || { head -c 1024 /dev/urandom >/etc/munge/munge.key; }
    chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key
    mkdir -p /run/munge; chown munge: /run/munge
    runuser -u munge -- munged
    munge_pid=$(cat /run/munge/munged.pid)
fi
cat >"$scratch/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/spool
SlurmctldPidFile=$scratch/ctld.pid
SlurmdPidFile=$scratch/d.pid
SlurmctldLogFile=$scratch/ctld.log
SlurmdLogFile=$scratch/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort=16817
SlurmdPort=16818
KillWait=5
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$scratch/slurm.conf
slurmctld; slurmd
for _ in $(seq 60); do [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && break; sleep 0.5; done

fail() { echo "FAILED: $1"; exit 1; }

echo "--- srun: two tasks, ranks found"
srun -n2 "$python" "$here/train.py" --folder "$scratch/straight" | tee "$scratch/straight.log"
[ "$(grep -c '^rank [01] of 2: step 20' "$scratch/straight.log")" = 2 ] || fail "two ranks did not finish"

echo "--- sbatch: ended by USR1, requeued by the job itself, resumed"
cat >"$scratch/job.sh" <<JOB
#!/bin/bash
srun -n2 "$python" "$here/train.py" --folder "$scratch/requeued" --seconds-a-step 0.5
code=\$?
echo "srun ended with \$code"
[ \$code != 75 ] || scontrol requeue \$SLURM_JOB_ID
JOB
log=$scratch/requeued.log
touch "$log"
seen() {
    for _ in $(seq 120); do [ "$(grep -c "$1" "$log")" -ge "$2" ] && return; sleep 0.5; done
    cat "$log"; scontrol show job "$job" || true; tail -n 50 "$scratch/ctld.log"
    fail "no '$1'"
}
job=$(sbatch --parsable --requeue --open-mode=append -n2 -o "$log" "$scratch/job.sh")
seen '^begins at step 0' 1
sleep 2
scancel -s USR1 "$job"  # as --signal=USR1@60 does, a minute before the limit
seen '^srun ended with 75' 1
# A requeued job waits for 2 minutes. It may start earlier, but not at once: SLURM sets that time again when the old run has
# been cleaned up, and kills a job whose new credential is of the second in which the old one was revoked.
for _ in $(seq 60); do [ "$(squeue -h -j "$job" -o %T)" = PENDING ] && break; sleep 0.5; done
sleep 5
scontrol update jobid="$job" StartTime=now
seen '^rank [01] of 2: step 20' 2
cat "$log"
saved=$(sed -n 's/.*It is saved at step \([0-9]*\):.*/\1/p' "$log")
grep -q "^begins at step $saved\$" "$log" || fail "it did not go on from step $saved, where it was saved"
[ "$(cat "$scratch/straight.log" "$log" | sed -n 's/.*weights //p' | sort -u | wc -l)" = 1 ] \
    || fail "the requeued run did not arrive at the straight run's weights"
echo "ok: srun, requeue, resumed from step $saved to the bit"
