"""Jobs in forked processes, each after those that it needs."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

import torch

from prunet.console import console

Job = Callable[[], object]
#: Name -> the job, and the names of those that it comes after.
Jobs = dict[str, tuple[Job, set[str]]]


def begin_worker(threads: int) -> None:
    console.quiet = True
    torch.set_num_threads(threads)


def do(name: str, job: Job) -> str:
    """Does a job in a worker; returns what went wrong."""
    try:
        job()
    except Exception:
        return traceback.format_exc()
    return ""


def all_done(jobs: Jobs, workers: int) -> Iterator[str]:
    """Does the jobs, `workers` at once; each after those that it names. Yields the name of each that has ended.

    The earliest that can begin is the next.
    """
    began, ended, running = time.perf_counter(), set[str](), dict[Future[str], str]()
    # Forked, so that nothing is imported again; no GPU is used in this process before.
    context = multiprocessing.get_context("fork")
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with ProcessPoolExecutor(workers, context, begin_worker, (threads,)) as pool:
        todo = dict(jobs)
        while todo or running:
            ready = [name for name, (_, after) in todo.items() if after <= ended]
            for name in ready[: workers - len(running)]:
                running[pool.submit(do, name, todo.pop(name)[0])] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                ended.add(name := running.pop(future))
                said = future.result()
                print(f"[{time.perf_counter() - began:6.1f} s] {name}: {said or 'done'}", flush=True)
                yield name
