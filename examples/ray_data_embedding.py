"""Embeddings by Ray Data: rows of a parquet or JSON-lines file through workers that hold a model each, into parquet files.

    pip install 'vlm2vec[train,ray]'
    python examples/ray_data_embedding.py MODEL ROWS OUTPUT [--workers 2] [--gpus 0] [--batch-size 64] [--as document] [--images DIR]

ROWS has columns text, image, video or instruction; image and video are bytes, or paths from DIR or else ROWS' own folder. On a cluster
(`ray job submit`, or RAY_ADDRESS) the same program uses all its machines. The data is streamed: a worker has one batch in memory, Ray's
store a few more. A worker that dies is started again and its batch is run again; finished batches stay.
"""

import argparse
import os

import ray

from vlm2vec.ray import Embedder


def embed(rows: str, output: str, model: str, *, workers: int, gpus: float, batch_size: int, embedder=Embedder, **options) -> None:
    """Write the rows with their vectors as parquet files into `output`; `options` are the embedder's."""
    dataset = (ray.data.read_parquet if rows.endswith(".parquet") else ray.data.read_json)(rows)
    # a worker's task is a block: by blocks of a batch each, a worker that dies costs its batch, and all workers have something to do
    embedded = dataset.repartition(target_num_rows_per_block=batch_size).map_batches(
        embedder,
        fn_constructor_args=(model,),
        fn_constructor_kwargs=options,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
        batch_size=batch_size,
    )
    embedded.write_parquet(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("output")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of a worker")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--as", dest="role", choices=("query", "document"))
    parser.add_argument("--images", help="folder that relative paths of rows are taken from (default: that of ROWS)")
    args = parser.parse_args()
    embed(
        args.rows,
        args.output,
        args.model,
        workers=args.workers,
        gpus=args.gpus,
        batch_size=args.batch_size,
        role=args.role,
        root=args.images or os.path.dirname(os.path.abspath(args.rows)),
        device=None if args.gpus else "cpu",
    )


if __name__ == "__main__":
    main()
