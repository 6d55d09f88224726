"""Training processes for tests: forked from one server that has imported what all of them need, alone or as two gloo ranks."""

import os
import queue as queue_module
import socket

import pytest
import torch
import torch.multiprocessing as mp


def context():
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(["preloaded"])
    return found


def start(main, *arguments, ranks=2):
    """Processes of `main(rank, port, *arguments)`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [context().Process(target=main, args=(rank, port, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def join(rank, port, ranks=2):
    """What torchrun sets, and one thread, so that equal runs give equal bits."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def ended(processes, timeout=400):
    """Exit codes, once all have ended."""
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]


def collected(main, *arguments, each, ranks=2):
    """{(name, rank): values} of what the ranks put into the queue they are handed last: (rank, name, *values), `each` times a rank.

    A rank that fails puts (rank, "failed", traceback, ...); one that crashes shows by its exit code.
    """
    queue, found = context().Queue(), {}
    processes = start(main, *arguments, queue, ranks=ranks)
    try:
        for _ in range(ranks * each):
            rank, name, *values = queue.get(timeout=240)
            if name == "failed":
                pytest.fail(f"rank {rank}: {values[0]}\nexit codes {ended(processes, 5)}")
            found[name, rank] = tuple(values)
    except queue_module.Empty:
        pytest.fail(f"a rank went quiet after {sorted(found)}: exit codes {[p.exitcode for p in processes]}")
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return found
