"""One command for a machine with CUDA, eight minutes: is everything right there, how fast is it, and what do predictions miss?

    python3 -m bench gpu [--parts env smoke ...] [--minutes 8] [--output DIR] [--dry]
    python3 -m bench gpu --record DIR

Runs from a bare checkout, nothing of it installed; it needs torch, triton, transformers, peft and pillow. DIR, by default
bench/scratch/gpu, gets results.json and results.csv, written anew after every check, and a log for each part. Parts, in order of worth:

    env        versions, rates of the library's products, of memory and of launches, packages that are missing
    smoke      every path once against float64, no wait for the device, torch.compile, CUDA graph, attention, a GradCache step, NCCL
    loss       value and gradients at 16,384 x 1,536 next to its three products, eager and torch.compile
    profile    kernels of one call by name, count and time; what a Triton product reaches of the library's
    gate       every option on every path and type against float64, by what the kernels are known to reach
    train      two real training steps of a 100M and a 7B model from random weights, against the plans in bench/gpu/planned
    sizes      the loss at other sizes, each option's cost, a large search
    peers      others' kernels, where they are installed
    attention  providers of packed attention against float32, and kernels of layers that carry a state (gated delta rule, convolution)

Every check is tried by itself. One that fails is a complaint and the rest goes on; one that hangs, kills its process or leaves the
device unusable costs that process alone. Parts and checks for which no time is left are told. The exit code is 1 when anything of
ours failed, 2 without CUDA, else 0: what peers fail at, and packages that are not there, are notes.

--dry runs all of it tiny on a CPU, kernels interpreted: a test of this program, no measurement. --record turns the results in DIR
into files to commit: bench/results/CARD/, the rates that the cost model reads (contrastive_kernels/roofline/measured.py) and
docs/performance.md. Without DIR it writes docs/performance.md anew from what is recorded.

Peers that are pure Python can be brought as wheels to a machine without a network, and results taken away from a folder:

    pip download --no-deps --dest wheels cut-cross-entropy inf-cl liger-kernel memeff siglip-kernel       # where there is a network
    python3 -m pip install --no-index --no-deps --target /tmp/peers wheels/*.whl
    PYTHONPATH=/tmp/peers python3 -m bench gpu --minutes 8 --output RESULTS 2>&1 | tee RESULTS.log

A part that failed runs again by itself: python3 -m bench gpu --parts smoke loss --minutes 3 --output RESULTS-again
"""
