"""Compiles the kernels for GPUs that are not there: launches are caught where the launchers make them, then built for a target.

    python -m bench.aot.compile ARCH FIRST STEP > rows.json     one process of the pool of `bench.aot.run`

Must run without TRITON_INTERPRET. The launchers see CPU tensors and are told the architecture, so that tile, flags, types and
strides are those of a real launch, not a second list of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.aot import sass
from bench.aot.launch_capture import CapturedLaunch
from bench.aot.launches import launches
from contrastive_kernels import roofline

CACHE = Path(__file__).resolve().parents[1] / "scratch/aot"
# what a description depends on besides the kernel: how machine code is read, and the limits it is held against
READER = hashlib.sha256(
    b"".join(Path(module.__file__).read_bytes() for module in (sass, roofline)) + Path(__file__).read_bytes()
).hexdigest()
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint32: "u32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "u1",
}


def _specialised(value, path: tuple[int, ...], constants: dict, attributes: dict):
    """Type of an argument in a signature; what is known of it when the kernel is compiled goes into `constants` and `attributes`.

    A tuple's elements are specialised like arguments, under their path of positions.
    """
    if isinstance(value, tuple):
        types = [_specialised(element, (*path, i), constants, attributes) for i, element in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def source(launch: CapturedLaunch) -> ASTSource:
    """Signature, constants and alignment as the run-time specialisation would find them."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = _specialised(value, (index,), constants, attributes)
    return ASTSource(launch.function, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(launch: CapturedLaunch, arch: int):
    return triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options={**launch.options, "enable_fp_fusion": True})


def occupancy(gpu: roofline.Gpu, registers: int, shared: int, threads: int) -> tuple[int, float]:
    """Blocks that fit on a multiprocessor, and the share of its threads that they fill."""
    warps = -(-threads // 32)
    # registers are handed out per warp in units of 256; a block keeps 1 KiB of shared memory for the system
    by_registers = gpu.registers // (warps * (-(-registers * 32 // 256) * 256)) if registers else gpu.blocks
    by_shared = gpu.shared // (shared + 1024)
    blocks = max(0, min(gpu.blocks, gpu.threads // (warps * 32), by_registers, by_shared))
    return blocks, blocks * warps * 32 / gpu.threads


def analyse(kernel, arch: int, threads: int) -> dict:
    """Registers, spills, shared memory, occupancy and the hot loop of a compiled kernel."""
    gpu = roofline.for_arch(arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        text = subprocess.run([BIN / "nvdisasm", "-ndf", "-c", cubin], capture_output=True, text=True, check=True).stdout
    registers = int((usage.stdout + usage.stderr).split("REG:")[1].split()[0])
    code = sass.parse(text)
    everything = code.count()
    loop = code.hot_loop()
    inside = code.count(*loop) if loop else {}
    # of a warp-specialised kernel the exponentials' group may be another one than the products'
    tiles = code.first_with("MUFU") if everything["USETMAXREG"] else code.around(loop) if loop else None
    products_group = loop and tiles and tiles[0] <= loop[0] <= tiles[1]
    after = code.count(loop[1] + 1 if products_group or not tiles else tiles[0], tiles[1] if tiles else 1 << 60) if loop else everything
    # warp specialisation adds warps to those that were asked for
    blocks, share = occupancy(gpu, registers, kernel.metadata.shared, max(threads, 32 * kernel.metadata.num_warps))
    return {
        "registers": registers,
        "spills": everything["LDL"] + everything["STL"],
        "shared": kernel.metadata.shared,
        "shared_limit": gpu.shared_block,
        "blocks_per_sm": blocks,
        "occupancy": round(share, 3),
        "tensor": {name: everything[name] for name in sass.TENSOR if everything[name]},
        "loop_tensor": sum(inside.get(name, 0) for name in sass.TENSOR),
        "loop": {name: inside[name] for name in sorted(inside, key=lambda n: -inside[n])},
        "narrow_loads": code.narrow_loads(*loop) if loop else [],
        "wide_bytes": code.wide_copies(*loop) * 16 * threads if loop else 0,
        "loop_instructions": sum(inside.values()),
        # of the longest loop inside the hot one: of top-k, another look through its tile
        "inner_instructions": max(
            (b - a + 1 for a, b in code.loops() if loop and (a, b) != loop and loop[0] <= a and b <= loop[1]), default=0
        ),
        "wide_stores": sum(i.name == "STG" and ".128" in i.full or i.name == "UTMASTG" for i in code.instructions),
        "instructions": sum(everything.values()),
        "epilogue": sum(after.values()),
        "exponentials": everything["MUFU"],
        "epilogue_exponentials": after["MUFU"],
        "copies_by_descriptor": everything["UTMALDG"],
        "register_hand_overs": everything["USETMAXREG"],
    }


def described(launch: CapturedLaunch, arch: int, threads: int) -> dict:
    """`analyse` of the compiled launch, or what it gave before for the same source, constants, options and reader."""
    parts = [source(launch).hash(), str(sorted(launch.options.items())), str(arch), triton.__version__, READER]
    cached = CACHE / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}.json"
    if cached.is_file():
        return json.loads(cached.read_text())
    description = analyse(compile_for(launch, arch), arch, threads)
    CACHE.mkdir(parents=True, exist_ok=True)
    part = cached.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(description))
    os.replace(part, cached)
    return description


def operand_bytes(constants: dict, itemsize: int) -> int:
    """Bytes of the matrices' tiles that one turn of the hot loop has to fetch."""
    if constants.get("BLOCK_D"):
        return constants["BLOCK_R" if "bwd" in constants["kernel"] else "BLOCK_C"] * constants["BLOCK_D"] * itemsize
    if constants.get("RESIDENT"):
        return constants["BLOCK_C"] * constants["BLOCK_K"] * constants["RESIDENT"] * itemsize
    return (constants["BLOCK_R"] + constants["BLOCK_C"]) * constants["BLOCK_K"] * itemsize


def description(name: str, launch: CapturedLaunch, arch: int, has_dot: bool) -> dict:
    """A row of the table: what a launch is, and what its machine code is like."""
    threads = 32 * launch.options.get("num_warps", 4)
    constants = {k: v for k, v in launch.arguments.items() if k.isupper()}
    block = constants.get("BLOCK_R", 1) * constants.get("BLOCK_C", 1)
    row = dict(
        kernel=launch.function.fn.__name__,
        case=name,
        arch=arch,
        dot=has_dot,
        warps=threads // 32,
        stages=launch.options.get("num_stages", 3),
        block=block,
        grid=int(launch.grid[0]),
        flops=launch.flops,
        bytes=launch.bytes,
    )
    row["grid"] = launch.tiles or row["grid"] * (int(launch.grid[1]) if len(launch.grid) > 1 else 1)
    row["operand_bytes"] = operand_bytes(constants | {"kernel": row["kernel"]}, 2) if has_dot else 0
    row |= {k.lower(): v for k, v in constants.items() if k.startswith("BLOCK") or k == "RESIDENT"}
    return row | described(launch, arch, threads)


def rows(arch: int, first: int = 0, step: int = 1):
    """Compile every `step`-th distinct launch from `first` on, and describe it."""
    for number, (name, launch, has_dot) in enumerate(launches(arch)):
        if number % step == first:
            try:
                yield description(name, launch, arch, has_dot)
            except Exception as error:  # of the compiler, whose passes raise RuntimeError: the row is a fault, the others are still built
                yield {"case": name, "kernel": launch.function.fn.__name__, "arch": arch, "error": f"{type(error).__name__}: {error}"[:400]}


def main() -> int:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("bench.aot.compile: TRITON_INTERPRET is set; it turns compilation off, unset it", file=sys.stderr)
        return 2
    arch, first, step = map(int, sys.argv[1:4])
    for row in rows(arch, first, step):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
