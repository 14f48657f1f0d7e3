"""The runner of the coverage matrix: rows in worker processes that are replaced when they hang or die."""

from __future__ import annotations

import contextlib
import faulthandler
import fnmatch
import gc
import importlib
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import subprocess
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from coverage_zoo import Row, crude_cost, zoo
from tqdm import tqdm

from ltm_retrofit.errors import RetrofitError

RUNS = Path("runs/coverage")
KEPT = Path("benchmarks/coverage.jsonl")  # what `write` leaves, so that another machine can go on
Work = Callable[[Row, dict[str, Any]], None]


def run_row(what: Work, row: Row) -> dict[str, Any]:
    """Return the record of one row, whatever happens."""
    record, began, busy = row.facts(), time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            what(row, record)
    except RetrofitError as error:
        record.update(status="refused", error=type(error).__name__, message=str(error)[:1500])
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/ltm_retrofit/" in frame.filename] or frames
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in (ours[-1], frames[-1])]
        message = " ".join(str(error).split())[:600]
        record.update(status="error", error=type(error).__name__, message=message, where=where)
    record["seconds"] = round(time.perf_counter() - began, 2)
    record["cpu_seconds"] = round(time.process_time() - busy, 2)  # what it takes where nothing else runs
    return record


def serve(pipe: Any, trace: str, what: Work) -> None:
    """Work in a process of its own: a row that hangs, dies or eats the memory takes nothing else with it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, file=open(trace, "w"), all_threads=False)
    rows = zoo()
    for module in ("timm", "transformers", "ltm_retrofit.find", "ltm_retrofit.plan"):
        importlib.import_module(module)  # not on the first row's time
    pipe.send("ready")
    while (name := pipe.recv()) is not None:
        pipe.send(run_row(what, rows[name]))
        gc.collect()


class Worker:
    """One worker process; `ask` never hangs, and after a failure the worker is to be replaced."""

    def __init__(self, what: Work, limit: float, memory: float, trace: Path) -> None:
        self.limit, self.memory, self.trace = limit, memory, trace
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, str(trace), what), daemon=True)
        self.process.start()
        theirs.close()
        try:
            ready = self.pipe.poll(300) and self.pipe.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            raise SystemExit("the worker process does not start; its own message stands above")

    def rss(self) -> float:
        """Return the worker's resident memory in GB."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * resource.getpagesize() / 1e9

    def ask(self, row: Row) -> dict[str, Any]:
        """Return the row's record; one that says why, where none came back."""
        with contextlib.suppress(OSError):  # seen below, as its death
            self.pipe.send(row.name)
        began, peak, why = time.perf_counter(), 0.0, ""
        while not self.pipe.poll(0.2):
            seconds, peak = time.perf_counter() - began, max(peak, self.rss())
            if seconds > self.limit:
                why = f"TimeLimit: more than {self.limit:g} s"
            elif peak > self.memory:
                why = f"MemoryLimit: {peak:.1f} GB, allowed are {self.memory:g}"
            if why:
                break
        else:
            try:
                return {**self.pipe.recv(), "peak_gb": round(peak, 2)}
            except (EOFError, OSError):
                self.process.join(5)
                why = f"Died: exit code {self.process.exitcode}"
        where = self._where()
        self.process.kill()
        self.process.join()
        kind, _, message = why.partition(": ")
        failure = {"status": "error", "error": kind, "message": message, "where": where}
        return {**row.facts(), **failure, "seconds": round(time.perf_counter() - began, 2), "peak_gb": round(peak, 2)}

    def _where(self) -> list[str]:
        """Ask a worker that hangs where it is."""
        if not self.process.is_alive() or self.process.pid is None:
            return []
        before = self.trace.stat().st_size
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        lines = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', self.trace.read_text()[before:])
        ours = [line for line in lines if "/ltm_retrofit/" in line[0]] or lines
        return [f"{Path(file).name}:{line} {name}" for file, line, name in [*ours[:1], *lines[:1]]]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(5)
        self.process.kill()


def read(path: Path) -> list[dict[str, Any]]:
    """Read records, passing over a last line that was cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def latest() -> dict[str, dict[str, Any]]:
    """Return the newest record of every row that was walked, those that were committed included."""
    records = [record for path in (KEPT, *RUNS.glob("shard*.jsonl")) for record in read(path)]
    return {record["name"]: record for record in sorted(records, key=lambda record: record["at"])}


def stamp() -> dict[str, str]:
    """Say what a record was made with and on."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB, one thread a shard"
    return {"commit": asked.stdout.strip(), "setup": f"Python {platform.python_version()}, {versions}; {machine}"}


def run(args: Namespace, what: Work, out: Path, done: dict[str, dict[str, Any]]) -> Counter[str]:
    """Ask workers for every row of this shard that is not done, cheap rows first, and append to ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    index, _, count = args.shard.partition("/")
    rows = sorted(zoo().values(), key=crude_cost)[int(index) - 1 :: int(count)]  # each shard gets cheap and dear ones
    if args.only:
        rows = [row for row in rows if fnmatch.fnmatch(row.name, args.only) or args.only in (row.family, row.group)]
    if args.redo_errors:
        done = {name: record for name, record in done.items() if record["status"] != "error"}
    made = stamp()
    if args.fresh:
        done = {name: record for name, record in done.items() if record["commit"] == made["commit"]}
    rows = [row for row in rows if row.name not in done]
    costs = {record["name"]: record["macs_before"] for record in read(RUNS / "check.jsonl") if "macs_before" in record}
    rows.sort(key=lambda row: costs.get(row.name) or crude_cost(row))
    worker: Worker | None = None
    tally = Counter[str]()
    bar = tqdm(rows, desc=f"{what.__name__} {args.shard}", dynamic_ncols=True, mininterval=1)
    with out.open("a") as file:
        for row in bar:
            bar.set_postfix_str(f"{row.name} {dict(tally)}")
            if worker is not None and (not worker.process.is_alive() or worker.rss() > 0.4 * args.memory):
                worker.close()  # it died with the last row, or has grown: graphs and traces are never given back
                worker = None
            worker = worker or Worker(what, args.limit, args.memory, out.with_suffix(".trace"))
            record = {**worker.ask(row), **made, "at": datetime.now(UTC).isoformat(timespec="seconds")}
            tally[record["status"]] += 1
            file.write(json.dumps(record) + "\n")
            file.flush()
    if worker is not None:
        worker.close()
    return tally
