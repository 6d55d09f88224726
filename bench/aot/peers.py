"""Peers' kernels compiled the same way as ours, where they are installed: what they launch for N = M, D is caught and built.

    python -m bench.aot.peers ARCH > rows.json     a child of `python -m bench aot --peers`

Their launchers see CPU tensors that say they are on a GPU. Of an autotuned kernel the first configuration that its own pruning leaves
is taken: which one would win is known to a GPU alone. A peer that cannot be caught is told with its reason.
"""

from __future__ import annotations

import contextlib
import json
import sys
from unittest import mock

import torch

from bench.aot.compile import description
from bench.aot.launch_capture import captured_launches
from bench.peers import on_gpu
from contrastive_kernels import roofline

N, D, TEMPERATURE = 1024, 1536, 0.05


def _leaves():
    query, target = (torch.randn(N, D, dtype=torch.bfloat16) for _ in range(2))
    return query.requires_grad_(), target.requires_grad_(), torch.arange(N)


def inf_cl():
    from inf_cl.flash import _flash_prob_backward, _flash_prob_forward

    q, k = (torch.randn(N, D // 256, 256) for _ in range(2))  # it widens everything to float32
    _flash_prob_backward(q, k, _flash_prob_forward(q, k), torch.ones(N))


def cut_cross_entropy():
    query, target, _ = _leaves()
    on_gpu.cut_cross_entropy(query, target, TEMPERATURE)()


def liger():
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    query, target, labels = _leaves()
    fused_linear_cross_entropy_forward(query, target, labels)


def memeff():
    query, target, _ = _leaves()
    on_gpu.memeff(query, target, TEMPERATURE)()


PEERS = {"inf-cl": inf_cl, "cut-cross-entropy": cut_cross_entropy, "Liger": liger, "memeff": memeff}


@contextlib.contextmanager
def pretended(arch: int):
    """CPU tensors say that they are on a GPU of `arch`, and an autotuner takes the first configuration it would try."""
    from triton.runtime.autotuner import Autotuner

    def first(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        config = self.prune_configs(kwargs)[0]
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    gpu = roofline.for_arch(arch)
    properties = mock.Mock(
        multi_processor_count=gpu.sms,
        major=arch // 10,
        minor=arch % 10,
        total_memory=int(gpu.memory),
        shared_memory_per_block_optin=gpu.shared_block,
    )
    properties.name = gpu.name
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.Tensor, "is_cuda", property(lambda self: True)),
            (Autotuner, "run", first),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda *a: (arch // 10, arch % 10)),
            (torch.cuda, "get_device_properties", lambda *a: properties),
            (torch.cuda, "get_device_name", lambda *a: gpu.name),
            (torch.cuda, "is_bf16_supported", lambda *a: True),
            (torch.cuda, "device", lambda *a: contextlib.nullcontext()),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def rows(arch: int):
    """A row for every kernel that a peer launches, or one with the reason why it could not be had."""
    for peer, call in PEERS.items():
        error, seen = None, set()
        with pretended(arch), captured_launches() as captured:
            try:
                call()
            except Exception as raised:  # of a library that was not written for this
                error = raised
        if isinstance(error, ImportError):
            continue
        for launch in captured:
            name = launch.function.fn.__name__
            if name in seen:
                continue
            seen.add(name)
            try:
                yield description(f"{peer}, {name}", launch, arch, has_dot=False) | {"peer": peer}
            except Exception as raised:
                yield {"peer": peer, "case": f"{peer}, {name}", "arch": arch, "note": f"{type(raised).__name__}: {str(raised)[:120]}"}
        if error is not None:
            yield {"peer": peer, "case": peer, "arch": arch, "note": f"{type(error).__name__}: {str(error)[:120]}"}


def main() -> int:
    for row in rows(int(sys.argv[1])):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
