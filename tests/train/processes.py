"""Training processes for tests: forked from one server that has imported what all of them need, alone or as two gloo ranks."""

import os
import socket

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
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def ended(processes, timeout=400):
    """Exit codes, once all have ended."""
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]
