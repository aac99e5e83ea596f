#!/usr/bin/env python3
"""sbatch, squeue, sacct and scancel as Slurm 22.05's manual has them, over a folder of jobs. FAKE_SLURM names the folder,
FAKE_SLURM_FAULT what goes wrong: `timeout` after the job was made, `refused`, `qos`, `hold` keeps jobs in the queue."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_SLURM"])
FAULT = os.environ.get("FAKE_SLURM_FAULT", "")


def option(name, default=None):
    return next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith(f"--{name}=")), default)


def jobs():
    return [json.loads(path.read_text()) for path in sorted(ROOT.glob("*.json"))]


def save(job):
    (ROOT / f"{job['id']}.json").write_text(json.dumps(job))


def is_alive(job):
    try:
        return Path(f"/proc/{job['pid']}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def seen(job):
    """The job as it is now: a running one whose process has ended is out of the queue."""
    if job["state"] == "RUNNING" and not is_alive(job):
        job["state"] = "COMPLETED"
        save(job)
    return job


def sbatch():
    if FAULT == "refused":
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    if FAULT == "qos":
        sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    number = str(len(jobs()) + 101)
    script = ROOT / f"{number}.sh"
    script.write_text(sys.stdin.read())
    job = {"id": number, "name": option("job-name"), "state": "PENDING", "words": sys.argv[1:], "pid": 0}
    if FAULT != "hold":
        with open(option("output"), "ab") as log:
            process = subprocess.Popen(["/bin/sh", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       cwd=option("chdir"), start_new_session=True)  # fmt: skip
        job |= {"state": "RUNNING", "pid": process.pid}
    save(job)
    if FAULT == "timeout":
        sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(f"{number};cluster")


def squeue():
    for job in map(seen, jobs()):
        if job["name"] == option("name") and job["state"] in ("PENDING", "RUNNING"):
            print(f"{job['id']}|{job['state']}|{'Resources' if job['state'] == 'PENDING' else 'None'}")


def sacct():
    if FAULT == "no accounts":
        sys.exit("Slurm accounting storage is disabled")
    for job in map(seen, jobs()):
        if job["name"] == option("name"):
            print(f"{job['id']}|{job['state']}{' by 1000' if job['state'] == 'CANCELLED' else ''}|None")


def scancel():
    job = next(job for job in jobs() if job["id"] == sys.argv[-1])
    if job["state"] == "RUNNING":
        os.kill(job["pid"], getattr(signal, f"SIG{option('signal', 'KILL')}"))
    else:
        save({**job, "state": "CANCELLED"})


if __name__ == "__main__":
    {"sbatch": sbatch, "squeue": squeue, "sacct": sacct, "scancel": scancel}[Path(sys.argv[0]).name]()
