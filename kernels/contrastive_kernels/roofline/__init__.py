"""What a GPU needs for the pieces of the loss: primitives of the cost model in `dispatch.py`, and of `python -m bench aot`.

Every time here is PREDICTED: floating point operations over an achieved rate, bytes over an achieved bandwidth, instructions of an
epilogue over the issue rate. Nothing in this file needs a GPU, torch or Triton. Rates that were measured (`measured.py`) take the place
of assumed ones. Units: seconds, bytes, FLOP (a multiply-add is two).

    three bare GEMMs     3 * 2NMD / achieved
    ours, on the device  logits product with epilogue  +  E target  +  E^T query  +  accumulation of panels  +  row vectors  +  launches
    ours, on the host    a call, and every launch as Python and torch make it: what a small loss takes

A call takes the longer of the two.

Source: `cards.py` for peaks and achieved rates.
"""

from __future__ import annotations

from .gpu import A100, ASSUMED, B200, GIB, GPUS, H100, H200, LAUNCH, TRITON_SHARE, Gpu, for_arch, measured  # noqa: F401  its face
from .piece import HOST_OPERATION, Piece

# Assumptions that compilation cannot tell.
ISSUE_SHARE = 0.6  # instructions issued while an epilogue waits on shared memory and stores
HOST_KERNEL = 15e-6  # a Triton kernel of some twenty arguments
HOST_PANEL = 25e-6  # one of more than forty
HOST_CALL = 80e-6  # checks, options and autograd of a call, whatever it launches: processor time of one core (AMD EPYC), as the next
EAGER_CALL = 60e-6  # autograd's own, of plain torch
PROGRAM_START = 1e-6  # a program that leaves at once, of a kernel that has a multiprocessor to itself
# Exponentials of a panel from which on unsafe rows are found by their sums: two launches more, and no maximum in the epilogue.
SUMS_ALONE = 1 << 26
REDO_PROGRAMS = 8  # for every tile of rows; a program walks every eighth tile of columns where it has work


def bytes_seconds(gpu: Gpu, count: float) -> float:
    return count / gpu.bandwidth


def rate(gpu: Gpu, itemsize: int) -> float:
    """FLOP/s of the library's products of 2-byte or 4-byte elements."""
    return gpu.achieved if itemsize <= 2 else gpu.achieved_fp32


def gemm(
    gpu: Gpu, m: int, n: int, k: int, *, itemsize: int, out_itemsize: int | None = None, accumulate: bool = False, name="gemm", times=1
) -> Piece:
    """(m, k) @ (k, n) by the library; `accumulate` reads and writes an existing output once more."""
    out = (out_itemsize or itemsize) * m * n
    read = itemsize * (m * k + k * n) + (out if accumulate else 0)
    flops = 2 * m * n * k
    seconds = max(flops / rate(gpu, itemsize), (read + out) / gpu.bandwidth)
    return Piece(name, flops, read, out, seconds + gpu.launch, times)


def elementwise(gpu: Gpu, read: float, written: float, *, name="elementwise", times=1, host: float = HOST_KERNEL) -> Piece:
    """A pass over memory; of ours where nothing is said of the host."""
    return Piece(name, 0, read, written, (read + written) / gpu.bandwidth + gpu.launch, times, host)


def small_operations(gpu: Gpu, times: int) -> Piece:
    """Fills of constants and row vectors, and the loss's last sum: launches alone."""
    return Piece("fills, last sum", 0, 0, 0, gpu.launch, times)


# Instructions a thread issues after the main loop, per element of the tile: upper bounds held by tests/bench/test_aot.py.
EPILOGUE_INSTRUCTIONS = {80: 15.0, 90: 12.0, 100: 20.0}
JOINT_INSTRUCTIONS = {80: 25.0, 90: 22.0, 100: 37.0}  # with column sums and without the greatest cosine, on its own tile
LEVEL_INSTRUCTIONS = {80: 24.0, 90: 18.0, 100: 25.0}  # of every prefix's epilogue


def exp_panel(
    gpu: Gpu,
    rows: int,
    columns: int,
    width: int,
    *,
    itemsize: int,
    tile: tuple[int, int],
    times=1,
    instructions: float | None = None,
    row_parts: int = 2,
    column_sums=False,
    store=True,
    levels: int = 1,
) -> Piece:
    """Logits product with exponential epilogue: (rows, width) @ (width, columns), E written in the operands' type.

    Main loop at `triton_share` of the library's rate, or as fast as L2 feeds its tiles; the epilogue is added in full, as if
    nothing of it hid behind another block's main loop. tile: rows and columns of the launch's tile. row_parts: numbers a tile leaves for
    a row, sum and greatest cosine.
    """
    flops = 2 * rows * columns * width
    tile_r, tile_c = tile
    read = itemsize * width * (rows + columns)
    written = levels * ((itemsize * rows * columns if store else 0) + 4 * row_parts * rows * -(-columns // tile_c))
    written += 4 * columns * -(-rows // tile_r) if column_sums else 0
    tiles = rows / tile_r * columns / tile_c
    from_l2 = tiles * (tile_r + tile_c) * width * itemsize
    loop = max(flops / (rate(gpu, itemsize) * gpu.triton_share), from_l2 / gpu.l2_bandwidth, (read + written) / gpu.bandwidth)
    per_element = EPILOGUE_INSTRUCTIONS.get(gpu.arch, 28.0) if instructions is None else instructions
    epilogue = rows * columns * per_element / (gpu.issue * ISSUE_SHARE)
    return Piece("logits product, exp epilogue", flops, read, written, loop + epilogue + gpu.launch, times, HOST_PANEL)


def chunk_panel(gpu: Gpu, rows: int, columns: int, *, itemsize: int, write=True, times=1) -> list[Piece]:
    """Softmax over float32 logits in memory: read for the sums, and where gradients are wanted read again and written."""
    cells = rows * columns
    out = [elementwise(gpu, 4 * cells, 3 * 4 * rows, name="softmax over float32 logits", times=times)]
    return out + ([elementwise(gpu, 4 * cells, itemsize * cells, name="softmax written", times=times)] if write else [])


def by_sums(rows: int, columns: int, bounded: bool, best: bool) -> bool:
    """Whether a panel's unsafe rows are found by their sums: nobody wants their maxima, and the panel is large."""
    return not bounded and not best and rows * columns >= SUMS_ALONE


def panels(
    gpu: Gpu,
    n: int,
    columns: int,
    width: int,
    panel_rows: int,
    *,
    itemsize: int,
    tile: tuple[int, int] = (128, 128),
    path: str = "exp",
    d_query=True,
    d_target=True,
    instructions: float | None = None,
    normalize=False,
    bounded=False,
    best=False,
) -> list[Piece]:
    """The pieces of one direction: n rows against `columns` candidates, in panels of `panel_rows` rows.

    Args:
        path: "exp" (exponentials from the product's epilogue) or "chunk" (float32 logits, then two kernels). tile: of the former.
        instructions: of the epilogue per element, as compiled; None takes the bound EPILOGUE_INSTRUCTIONS.
        normalize: rows are normalised on the fly. bounded: no row has to be looked at again. best: greatest cosines are wanted.
    """
    full, rest = divmod(n, panel_rows)
    out: list[Piece] = []
    for rows, times in ((panel_rows, full), (rest, 1 if rest else 0)):
        if not times:
            continue
        if path == "exp":
            parts, sums = -(-columns // tile[1]), by_sums(rows, columns, bounded, best)
            look = best or not (bounded or sums)
            out.append(
                exp_panel(
                    gpu, rows, columns, width, itemsize=itemsize, tile=tile, times=times, instructions=instructions, row_parts=1 + look
                )
            )
            if sums:
                out += [mark_rows(gpu, rows, parts, own=False, times=times), redo_check(gpu, rows, times=times)]
            if not bounded:
                out += [mark_rows(gpu, rows, parts, times=times), redo_check(gpu, rows, times=times)]
            out.append(finish_rows(gpu, rows, parts + 1 + parts * best, times=times))
        else:
            out.append(gemm(gpu, rows, columns, width, itemsize=itemsize, out_itemsize=4, name="logits, float32", times=times))
            out += chunk_panel(gpu, rows, columns, itemsize=itemsize, write=d_query or d_target, times=times)
            out.append(finish_rows(gpu, rows, 3, times=times))
        out += gradient_products(
            gpu,
            rows,
            columns,
            width,
            itemsize=itemsize,
            first=rows == panel_rows,
            d_query=d_query,
            d_target=d_target,
            project=normalize,
            times=times,
        )
    ends = normalisation(gpu, n, columns, width, itemsize=itemsize, unit=d_query, project=d_target) if normalize else []
    return [positive_cosines(gpu, n, width, itemsize=itemsize), *ends, *out, small_operations(gpu, 5 if path == "exp" else 4)]


def gradient_products(
    gpu: Gpu, rows: int, columns: int, width: int, *, itemsize: int, first: bool, d_query=True, d_target=True, project=False, times=1
) -> list[Piece]:
    """What follows a panel's exponentials; `first`: the panel, or the first of `times`, that writes d_target, to which all others add."""
    out = []
    if d_query:
        out.append(gemm(gpu, rows, width, columns, itemsize=itemsize, out_itemsize=4, name="d_query = E target", times=times))
        out.append(row_update(gpu, rows, width, itemsize=itemsize, project=project, times=times))
    if d_target:
        out.append(elementwise(gpu, itemsize * rows * width, itemsize * rows * width, name="scaled query", times=times))
        # the positives' terms come first, and every product adds: it waits for its sums, not for memory
        for count, add in ((int(first), False), (times - int(first), True)):
            if count:
                out.append(positive_scatter(gpu, rows, columns, width, itemsize=itemsize, add=add, times=count))
        out.append(
            gemm(gpu, columns, width, rows, itemsize=itemsize, out_itemsize=4, accumulate=True, name="d_target += E^T query", times=times)
        )
    return out


def normalisation(gpu: Gpu, n: int, columns: int, width: int, *, itemsize: int, unit=True, project=True) -> list[Piece]:
    """Norms of both sides, unit targets for d_query, and d_target's projection; that of d_query goes along with its row factors."""
    out = [elementwise(gpu, itemsize * rows * width, 4 * rows, name="inverse norms") for rows in (n, columns)]
    if unit:
        out.append(elementwise(gpu, itemsize * columns * width, itemsize * columns * width, name="unit targets"))
    if project:
        out.append(projection(gpu, columns, width, itemsize=itemsize))
    return out


def projection(gpu: Gpu, rows: int, width: int, *, itemsize: int) -> Piece:
    return elementwise(gpu, (4 + itemsize) * rows * width, 4 * rows * width, name="projection of a gradient")


def mark_rows(gpu: Gpu, rows: int, parts: int, *, own=True, times=1) -> Piece:
    """Rows whose greatest logit, or without `own` whose sum, lies outside the fixed shift's window (triton/kernels/row_state.py)."""
    return elementwise(gpu, 4 * rows * (parts + 1), 4 * rows * own, name="rows to look at again", times=times)


def finish_rows(gpu: Gpu, rows: int, vectors: int, *, times=1) -> Piece:
    """From `vectors` partial results of a row to its sums, loss and factors (triton/kernels/row_state.py)."""
    return elementwise(gpu, 4 * rows * (vectors + 2), 4 * rows * 9, name="rows worked out", times=times)


def levels(gpu: Gpu, n: int, columns: int, dims, panel_rows: int, *, itemsize: int, tile: tuple[int, int] = (128, 64)) -> list[Piece]:
    """All Matryoshka levels of one direction (triton/matryoshka.py): one logits product, an epilogue and two products a level."""
    per_element = LEVEL_INSTRUCTIONS.get(gpu.arch, 23.0) * len(dims)
    out = []
    for rows, times in ((panel_rows, n // panel_rows), (n % panel_rows, 1)):
        if rows and times:
            out.append(
                exp_panel(
                    gpu,
                    rows,
                    columns,
                    max(dims),
                    itemsize=itemsize,
                    times=times,
                    instructions=per_element,
                    levels=len(dims),
                    tile=tile,
                    row_parts=1,
                )
            )
    for dim in dims:
        # what a sweep has besides its logits product
        rest = panels(gpu, n, columns, dim, panel_rows, itemsize=itemsize, tile=tile, normalize=True, bounded=True)
        out += [piece for piece in rest if not piece.name.startswith("logits")]
    return out


def joint(
    gpu: Gpu, n: int, width: int, *, itemsize: int, tile: tuple[int, int] = (128, 128), d_query=True, d_target=True, normalize=False
) -> list[Piece]:
    """Both directions of n pairs from one panel (triton/symmetric.py)."""
    per_element = JOINT_INSTRUCTIONS.get(gpu.arch, 37.0)
    stored = d_query or d_target
    out = [positive_cosines(gpu, n, width, itemsize=itemsize)]
    out += normalisation(gpu, n, n, width, itemsize=itemsize, unit=d_query, project=d_target) if normalize else []
    out.append(
        exp_panel(gpu, n, n, width, itemsize=itemsize, tile=tile, instructions=per_element, row_parts=1, column_sums=True, store=stored)
    )
    out += [finish_rows(gpu, n, -(-n // side) + 1) for side in reversed(tile)]
    if stored:
        out.append(elementwise(gpu, itemsize * n * n, itemsize * n * n, name="both directions' factors"))
    if d_query:
        out.append(gemm(gpu, n, width, n, itemsize=itemsize, out_itemsize=4, name="d_query = G target"))
        out.append(row_update(gpu, n, width, itemsize=itemsize))
        out += [projection(gpu, n, width, itemsize=itemsize)] if normalize else []
    if d_target:
        out.append(positive_scatter(gpu, n, n, width, itemsize=itemsize, add=False))
        out.append(gemm(gpu, n, width, n, itemsize=itemsize, out_itemsize=4, accumulate=True, name="d_target += G^T query"))
    return [*out, small_operations(gpu, 11)]


def positive_cosines(gpu: Gpu, rows: int, width: int, *, itemsize: int) -> Piece:
    return elementwise(gpu, 2 * itemsize * rows * width, 4 * rows, name="cosines of the positives")


def row_update(gpu: Gpu, rows: int, width: int, *, itemsize: int, project=False, times=1) -> Piece:
    """Row factors, the positive's own term and the projection, from the product's result to the gradient (triton/kernels/rows.py)."""
    return elementwise(gpu, (4 + itemsize * (1 + project)) * rows * width, 4 * rows * width, name="row factors, positives", times=times)


def positive_scatter(gpu: Gpu, rows: int, columns: int, width: int, *, itemsize: int, add: bool, times=1) -> Piece:
    """The positives' own terms of the candidates: every row's query onto its target, or into a new matrix of zeros elsewhere."""
    touched = min(rows, columns)
    read, written = (4 * touched, 4 * touched) if add else (0, 4 * columns)
    return elementwise(gpu, (read + itemsize * rows) * width, written * width, name="positives of d_target", times=times)


def redo_check(gpu: Gpu, rows: int, *, times=1) -> Piece:
    """The second launch over rows whose shift was unsafe: every program reads one number and leaves."""
    programs = REDO_PROGRAMS * -(-rows // 128)
    return Piece("unsafe rows: none", 0, 0, 0, gpu.launch + programs / gpu.sms * PROGRAM_START, times, HOST_PANEL)


# Instructions a thread issues per element of a tile in a fused kernel's loop: upper bounds, held by tests/bench/test_aot.py.
FUSED_INSTRUCTIONS = {80: 20.5, 90: 15.5, 100: 22.0}


def fused(gpu: Gpu, rows: int, columns: int, width: int, *, itemsize: int, backward=False, products: int = 2) -> Piece:
    """One fused pass: `products` products a tile, operands alone in memory; `width` is what rows are padded to.

    Product and epilogue of a tile depend on each other, so their times are added.
    """
    flops = 2 * products * rows * columns * width
    read = itemsize * width * (rows + columns) + (8 * rows if backward else 0)
    # sums and gradient rows of the anchors, or gradient rows of the candidates
    written = 4 * columns * width if backward else 4 * rows * (3 + (width if products > 1 else 0))
    loop = max(flops / (rate(gpu, itemsize) * gpu.triton_share), (read + written) / gpu.bandwidth)
    epilogue = rows * columns * FUSED_INSTRUCTIONS.get(gpu.arch, 22.0) / (gpu.issue * ISSUE_SHARE)
    return Piece(
        "fused d_target" if backward else "fused sums and d_query", flops, read, written, loop + epilogue + gpu.launch, 1, HOST_PANEL
    )


def fused_passes(gpu: Gpu, n: int, columns: int, width: int, *, itemsize: int, d_query=True, d_target=True, normalize=False) -> list[Piece]:
    """The pieces of one direction on the fused path."""
    padded = max(32, 1 << (width - 1).bit_length())  # as fused.block_width pads
    out = normalisation(gpu, n, columns, width, itemsize=itemsize, unit=False, project=d_target) if normalize else []
    out += [fused(gpu, n, columns, padded, itemsize=itemsize, products=2 if d_query else 1), finish_rows(gpu, n, 3)]
    if d_query:
        out.append(row_update(gpu, n, width, itemsize=itemsize, project=normalize))
    if d_target:
        out.append(fused(gpu, n, columns, padded, itemsize=itemsize, backward=True))
        out.append(positive_scatter(gpu, n, columns, width, itemsize=itemsize, add=True))
    return [positive_cosines(gpu, n, width, itemsize=itemsize), *out, small_operations(gpu, 9)]


def dense(gpu: Gpu, n: int, m: int, d: int, *, itemsize: int) -> list[Piece]:
    """Every logit in memory, and one kernel over them (triton/dense.py)."""
    cells = n * m
    out = [gemm(gpu, n, m, d, itemsize=itemsize, out_itemsize=4, name="logits, float32")]
    out.append(elementwise(gpu, 4 * cells, itemsize * cells + 4 * n, name="slopes of a row"))
    out += [
        gemm(gpu, *shape, itemsize=itemsize, out_itemsize=4, name=name)
        for name, shape in (("d_query = G target", (n, d, m)), ("d_target = G^T query", (m, d, n)))
    ]
    return [*out, small_operations(gpu, 4)]


def eager(gpu: Gpu, n: int, m: int, d: int, *, itemsize: int, normalize=False) -> list[Piece]:
    """What plain torch launches for the same loss through autograd, logits in float32: everything N x M, the rival of a small batch."""
    cells, host = n * m, HOST_OPERATION
    passes = [
        ("logits to float32", itemsize, 4),
        ("over the temperature", 4, 4),
        ("log softmax", 4, 4),
        ("its derivative", 12, 4),
        ("over the temperature", 4, 4),
        ("to the inputs' type", 4, itemsize),
    ]
    out = [gemm(gpu, n, m, d, itemsize=itemsize, name="logits")]
    out += [elementwise(gpu, read * cells, written * cells, name=name, host=host) for name, read, written in passes]
    out += [gemm(gpu, *shape, itemsize=itemsize, name=name) for name, shape in (("d_query", (n, d, m)), ("d_target", (m, d, n)))]
    if normalize:  # both sides, forward and backward, in the inputs' type
        for rows in (n, m):
            out += [elementwise(gpu, 2 * itemsize * rows * d, itemsize * rows * d, name="normalisation", times=10, host=host)]
    return [*out, small_operations(gpu, 4)]


def seconds(pieces) -> float:
    """On the device."""
    return sum(p.seconds * p.times for p in pieces)


def launches(pieces) -> int:
    return sum(p.times for p in pieces)


def host_seconds(pieces, call: float = HOST_CALL) -> float:
    """Until the host has launched everything; `call`: what it does besides."""
    return call + sum(p.host * p.times for p in pieces)


def predicted(pieces, call: float = HOST_CALL) -> float:
    """Seconds of a call: device and host work side by side, and the slower one is waited for."""
    return max(seconds(pieces), host_seconds(pieces, call))


def three_gemms(gpu: Gpu, n: int, m: int, d: int, *, itemsize: int) -> float:
    """Seconds of the limit: logits, d_query and d_target as bare library products."""
    return seconds([gemm(gpu, n, m, d, itemsize=itemsize), gemm(gpu, n, d, m, itemsize=itemsize), gemm(gpu, m, d, n, itemsize=itemsize)])
