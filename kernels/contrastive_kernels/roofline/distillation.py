"""What distillation from embeddings is predicted to take on a GPU: four library products and two passes over both models' logits.

    python -m contrastive_kernels.roofline.distillation --rows 8192 --columns 8192 --width 2048 --teacher-width 4096 [--gpu h100]

PREDICTED, with the rates and shares of this package. There is one way, so nothing is chosen: panels are as large as the workspace allows.
"""

from __future__ import annotations

import argparse

from . import GPUS, Gpu, Piece, elementwise, gemm, host_seconds, launches, seconds, small_operations

MIB = 1 << 20
ROW_OPERATIONS = 40  # on vectors of a panel's rows: both models' sums become losses, slopes and factors, in float64


def panel_bytes(columns: int, width: int, itemsize: int) -> int:
    """Scratch of one row of a panel: float32 logits of both models, the difference of their probabilities, and the products' rows."""
    return columns * (8 + itemsize) + width * (4 + 2 * itemsize)


def panel_rows(rows: int, columns: int, width: int, itemsize: int, workspace: int) -> int:
    """Rows of a panel that fit in `workspace` bytes, at least one."""
    return max(1, min(rows, workspace // panel_bytes(columns, width, itemsize)))


def distillation(
    gpu: Gpu, rows: int, columns: int, width: int, teacher_width: int, panel: int, *, itemsize: int = 2, gradients: bool = True
) -> list[Piece]:
    """The pieces of one direction. panel: rows at a time. itemsize: of both models' embeddings."""
    out: list[Piece] = []
    full, rest = divmod(rows, panel)
    for count, times in ((panel, full), (rest, 1 if rest else 0)):
        if not times:
            continue
        cells = count * columns
        out += [
            gemm(gpu, count, columns, width, itemsize=itemsize, out_itemsize=4, name="student's logits", times=times),
            gemm(gpu, count, columns, teacher_width, itemsize=itemsize, out_itemsize=4, name="teacher's logits", times=times),
            elementwise(gpu, 8 * cells, 20 * count, name="both softmaxes' sums", times=times),
            small_operations(gpu, ROW_OPERATIONS * times),
        ]
        if gradients:
            out += [
                elementwise(gpu, 8 * cells, itemsize * cells, name="difference written", times=times),
                gemm(gpu, count, width, columns, itemsize=itemsize, out_itemsize=4, name="d_query", times=times),
                gemm(gpu, columns, width, count, itemsize=itemsize, out_itemsize=4, accumulate=panel < rows, name="d_target", times=times),
            ]
    return out


def four_products(gpu: Gpu, rows: int, columns: int, width: int, teacher_width: int, *, itemsize: int = 2) -> float:
    """Seconds of the bare library products."""
    products = [(rows, columns, width), (rows, columns, teacher_width), (rows, width, columns), (columns, width, rows)]
    return seconds([gemm(gpu, *shape, itemsize=itemsize, out_itemsize=4) for shape in products])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m contrastive_kernels.roofline.distillation", description=__doc__.splitlines()[0])
    for name in ("rows", "columns", "width", "teacher-width"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--gpu", default="h100", choices=sorted(GPUS))
    parser.add_argument("--workspace-mib", type=float, default=8192)
    args = parser.parse_args(argv)
    panel = panel_rows(args.rows, args.columns, args.width, 2, int(args.workspace_mib * MIB))
    pieces = distillation(GPUS[args.gpu], args.rows, args.columns, args.width, args.teacher_width, panel)
    print(f"{args.rows} rows x {args.columns} columns, D={args.width}, teacher's {args.teacher_width}, bfloat16, {args.gpu}; PREDICTED")
    print("\n".join(piece.line() for piece in pieces))
    bare = four_products(GPUS[args.gpu], args.rows, args.columns, args.width, args.teacher_width)
    print(
        f"{seconds(pieces) * 1e3:.3f} ms on the device, {host_seconds(pieces) * 1e3:.3f} of the host, {launches(pieces)} launches, "
        f"{panel} rows at a time; the four bare products {bare * 1e3:.3f} ms: {seconds(pieces) / bare:.3f} times that"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
