"""What the bench reads from the kernel, and how it starts and stops programs. Linux, standard library only."""
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

CORES = sorted(os.sched_getaffinity(0))
# The gateway alone on the first core; load and backend share the rest (PROTOCOL.md).
GATEWAY_CORES, OTHER_CORES = CORES[:1], CORES[1:] or CORES


def raise_file_limit():
    """As many descriptors as we may have; the programs that we start inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Program:
    """A started program on given cores. Its output goes to a file, so that a full pipe never slows it down."""

    def __init__(self, argv, cores, log, env=None):
        self.argv, self.log = [str(word) for word in argv], Path(log)
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cores))

    def wait_for_line(self, before, after="", within_s=30):
        """The word that follows `before` in the output; what the program says when it is ready."""
        return self._until(lambda: self._word(before), f"print {before!r}", within_s)

    def wait_for_port(self, port, within_s=30):
        """For programs that say nothing when they are ready."""
        def accepts():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0
        return self._until(accepts, f"listen on {port}", within_s)

    def _word(self, before):
        for line in self.log.read_text(errors="replace").splitlines():
            # "operator listening on" is another listener's line.
            if line.find(before) >= 0 and not (before.startswith("listening") and "operator " + before in line):
                return line[line.find(before) + len(before):].split()[0]
        return None

    def _until(self, found, what, within_s):
        deadline = time.monotonic() + within_s
        while not (result := found()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.argv[0]} did not {what}:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        return result

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def pids(self):
        """This process and its children (nginx has a master and a worker)."""
        tree, at = [self.process.pid], 0
        while at < len(tree):
            for task in Path(f"/proc/{tree[at]}/task").iterdir():
                tree += map(int, (task / "children").read_text().split())
            at += 1
        return tree

    def cpu(self):
        return CpuReading(self.pids())

    def resident_kib(self):
        """VmRSS of all processes, anonymous and file-backed."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1])
        return total


class CpuReading:
    """CPU time that processes have used so far.

    utime + stime of /proc/PID/stat come in steps of 10 ms, too coarse for a few streams. The scheduler's own count of
    the same time (schedstat, nanoseconds, one file a thread) is used instead while no thread has ended in between.
    """

    def __init__(self, pids):
        self.when = time.monotonic()
        self.threads, self.ticks = {}, 0
        for pid in pids:
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            self.ticks += int(stat[11]) + int(stat[12])
            for task in Path(f"/proc/{pid}/task").iterdir():
                try:
                    self.threads[task.name] = int((task / "schedstat").read_text().split()[0])
                except (FileNotFoundError, ProcessLookupError):
                    pass
        self.core = core_busy_ticks(GATEWAY_CORES[0])

    def since_us(self, earlier):
        if earlier.threads and set(earlier.threads) <= set(self.threads):
            return sum(ns - earlier.threads.get(name, 0) for name, ns in self.threads.items()) / 1000
        return (self.ticks - earlier.ticks) * 1_000_000 / TICKS_PER_S

    def others_share(self, earlier):
        """Which part of the gateway's core went to somebody else (another process, a stolen or interrupted core)."""
        busy_s = (self.core - earlier.core) / TICKS_PER_S
        return max(0.0, busy_s - self.since_us(earlier) / 1e6) / (self.when - earlier.when)


def core_busy_ticks(core):
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            return user + nice + system + irq + softirq + steal
    raise RuntimeError(f"no cpu{core} in /proc/stat")


def describe():
    """The machine and the source, in one paragraph's worth of facts."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]
    except OSError:
        pages = "unknown"
    return {
        "commit": git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if git("status", "--porcelain") else ""),
        "machine": f"{model}, {len(CORES)} cores, {memory_gib:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}, transparent huge pages: {pages}",
    }


def git(*words):
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() or ("unknown" if words[0] == "rev-parse" else "")


def version(tool, *flags):
    """The version line of an installed program, or None."""
    if shutil.which(tool) is None and not Path(tool).exists():
        return None
    done = subprocess.run([tool, *flags], capture_output=True, text=True)
    return (done.stdout + done.stderr).strip().splitlines()[0]
