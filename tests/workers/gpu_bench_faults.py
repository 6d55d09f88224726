"""A child of `python -m bench gpu` with a fault planted in its part: what tests/bench/test_gpu_bench_runs.py has the runner start.

    python tests/workers/gpu_bench_faults.py PART --device cpu --dry ...

A fault of every kind: exceptions, wrong numbers, a lost factor of ten, a process that dies, a check that hangs, a lost device.
"""

import os
import signal
import sys
import time

import torch

from bench.gpu import cases, check, child
from bench.peers import on_gpu


def raising(message: str, kind=RuntimeError):
    def run(*args, **kwargs):
        raise kind(message)

    return run


def env():
    from bench.gpu.parts import env

    env.copy = raising("planted in env")


def smoke():
    from bench.gpu.parts import smoke

    smoke.sigmoid = lambda machine: os.kill(os.getpid(), signal.SIGKILL)
    smoke.pooled = lambda machine: time.sleep(600)
    smoke.attention = raising("planted: varlen_attn() got an unexpected keyword argument", TypeError)


def loss():
    """Ours, through autograd, has gradients that are 2 % too large."""
    made = on_gpu.ours_autograd

    def wrong(query, target, temperature):
        run = made(query, target, temperature)
        return lambda: tuple(value * 1.02 for value in run())

    on_gpu.ours_autograd = wrong


def profile():
    from bench.gpu.parts import profile

    made = profile.triton_share
    profile.triton_share = lambda machine, panel: raising("planted in profile")() if panel == "plain" else made(machine, panel)


def gate():
    """Gradients of the queries err ten times as much as they do."""
    made = cases.result_on

    def worse(case, path, query, target, options):
        result = made(case, path, query, target, options)
        if result is not None and case.name == "plain" and case.dtype == torch.bfloat16:
            right = cases.truth_of(query, target, options, torch.float64)["d_query"]
            result.d_query.copy_(right + 10 * (result.d_query.double() - right))
        return result

    cases.result_on = worse


def train():
    from bench.gpu.parts import train

    step = train._timed
    train._timed = lambda *args: step(*args) | {"norm": float("nan")}


def sizes():
    """An option that raises what a kernel out of bounds does; the process loses the device by it."""
    from bench.gpu.parts import sizes

    sizes.ring = raising("CUDA error: an illegal memory access was encountered")


def peers():
    on_gpu.sentence_transformers = raising("planted in a peer")
    ours = on_gpu.ours

    def wrong(**options):
        make = ours(**options)
        return lambda query, target, temperature: (lambda run: lambda: (run()[0] * 1.01, *run()[1:]))(make(query, target, temperature))

    on_gpu.ours = wrong


def attention():
    from bench.gpu.parts import attention

    attention.available = lambda: ["sdpa", "varlen"]  # varlen has no CPU kernel: it raises


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    made = check.Check.__init__

    def impatient(self, name, *args, **kwargs):
        made(self, name, *args, **kwargs | ({"seconds": 2.0} if name == "pooled_info_nce" else {}))

    check.Check.__init__ = impatient
    sys.exit(child.main())
