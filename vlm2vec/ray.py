"""`Embedder`: a model as a worker of Ray Data, for embedding on many machines.

    rows.repartition(target_num_rows_per_block=256).map_batches(
        Embedder, fn_constructor_args=(MODEL,), compute=ray.data.ActorPoolStrategy(size=8), num_gpus=1, batch_size=256)

Ray streams the rows, starts the workers, and starts one again where it dies, with the block of rows that it had. This module needs no Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm2vec import encoding
from vlm2vec.checkpoint.words import ROLES, said_as
from vlm2vec.data.bulk.inputs import rooted
from vlm2vec.files.documents import shown
from vlm2vec.inputs import ITEM_KEYS, VISUAL_KEYS

if TYPE_CHECKING:
    import numpy as np

ERROR = "embedding_error"


class Embedder:
    """Adds a column of vectors to batches of rows: the same vectors that `vlm2vec embed` makes.

    A batch is {column: array of n values}. Columns text, image, video and instruction are the input, as of a JSONL's row: image and video
    are paths, bytes of a file, data: URIs, {"bytes":, "path":}, or a list of these; all other columns go through. A worker holds one
    model, and vectors leave its device pass by pass.

    Args:
        model: folder or hub name, as of `VLM2Vec.from_pretrained`, which takes `model_options` too.
        role: "query" or "document": the words of `vlm2vec embed --as`. prompt: a name or the text itself, instead.
        batch_size: inputs of one pass of the model, at most.
        truncate_dim: keep the first dimensions.
        columns: {"text": "caption", ...} where columns have other names than the inputs' own.
        root: folder that relative paths are taken from, by each worker; None: the worker's own (`embed` takes the table's).
        output: name of the new column, (n, D) float32.
        skip_bad: rows that cannot be read get zeros and say why in the column `embedding_error`, "" for the others; otherwise they raise.

    Raises:
        ValueError: an unknown role or column; a batch without any input; a row that cannot be read, by its number in the batch.

    Example:
        >>> import numpy
        >>> embedder = Embedder("quickstart/model", device="cpu")
        >>> batch = embedder({"id": numpy.array([1, 2]), "text": numpy.array(["a fox", "an owl"], dtype=object)})
        >>> sorted(batch), batch["embedding"].shape == (2, embedder.model.embedding_dim)
        (['embedding', 'id', 'text'], True)
    """

    def __init__(
        self,
        model: str,
        *,
        role: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        truncate_dim: int | None = None,
        columns: dict[str, str] | None = None,
        root: str | None = None,
        output: str = "embedding",
        skip_bad: bool = False,
        **model_options: Any,
    ):
        from vlm2vec.model import VLM2Vec

        self.columns = {name: name for name in ITEM_KEYS} | (columns or {})
        unknown = [name for name in self.columns if name not in ITEM_KEYS]
        if unknown:
            raise ValueError(f"columns={shown(columns)}: expected names among {', '.join(ITEM_KEYS)}, got {shown(unknown[0])}")
        if role is not None and (role not in ROLES or prompt is not None):
            raise ValueError(f"role={shown(role)}: expected {' or '.join(ROLES)}, and no prompt beside it")
        self.model = VLM2Vec.from_pretrained(model, **model_options).merge_adapter()
        self.role, self.prompt, self.batch_size, self.truncate_dim = role, prompt, batch_size, truncate_dim
        self.root, self.output, self.skip_bad = root, output, skip_bad

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with its vectors; see the class."""
        import numpy as np

        inputs = self._inputs(batch)
        prompt, bad = self.prompt, {} if self.skip_bad else None
        if self.role is not None:
            inputs, prompt = said_as(self.model, inputs, self.role)
        vectors = encoding.encode(
            self.model,
            inputs,
            prompt=prompt,
            batch_size=self.batch_size,
            show_progress_bar=False,
            convert_to_tensor=False,
            normalize_embeddings=True,
            truncate_dim=self.truncate_dim,
            unreadable=bad,
            keep_on="cpu",
        )
        made = {**batch, self.output: vectors}
        if bad is not None:
            made[ERROR] = np.array([bad.get(row, "") for row in range(len(inputs))], dtype=object)
        return made

    def _inputs(self, batch: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """A row's own columns as an input, those without a value left out."""
        given = {name: batch[column] for name, column in self.columns.items() if column in batch}
        if not given:
            raise ValueError(f"a batch of columns {shown(list(batch))}: expected some of {', '.join(self.columns.values())}; see columns=")
        count = len(next(iter(given.values())))
        return [self._row({name: values[row] for name, values in given.items()}) for row in range(count)]

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Values of one row as Python's own; missing ones (None, NaN) are not there. Paths begin at `root`, as in `vlm2vec embed`."""
        made = {}
        for name, value in row.items():
            value = _plain(value)
            if value is None or (isinstance(value, float) and value != value):
                continue
            is_media = name in VISUAL_KEYS and isinstance(value, (str, list, dict)) and value
            made[name] = rooted(self.root, value) if is_media and self.root is not None else value
        return made


def _plain(value: Any) -> Any:
    """Lists for Ray's arrays of paths, bytes or objects; pictures' own arrays of numbers stay."""
    if not hasattr(value, "dtype"):
        return value
    if not value.ndim:
        return value.item()
    return [_plain(one) for one in value] if value.dtype.kind in "OUS" else value
