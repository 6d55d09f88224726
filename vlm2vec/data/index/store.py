"""`Index`: a folder's pictures, films and texts, embedded once, kept up to date, and searched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vlm2vec import encoding
from vlm2vec.checkpoint.words import said_as
from vlm2vec.data.index import changes, identity
from vlm2vec.data.index.entries import KINDS, entries
from vlm2vec.data.index.nearest import nearest
from vlm2vec.data.index.state import Row, State, is_index, read_state, signature, write_state
from vlm2vec.files.documents import shown
from vlm2vec.files.locks import locked

if TYPE_CHECKING:
    import numpy as np

    from vlm2vec.model import VLM2Vec


class Hit(NamedTuple):
    """One answer of a search.

    Attributes:
        key: the path below the indexed folder, or the key of a JSONL's row.
        score: cosine similarity, where vectors have length 1 as the model's have.
        kind: "image", "video", "text" or "row".
        file: to be shown, "" for none. text: the beginning of a text.
    """

    key: str
    score: float
    kind: str
    file: str
    text: str


class Index:
    """Vectors of a folder in a folder of their own, exact inner-product search, updates that are whole or not at all.

    A process may search while another updates: it goes on with what it opened until `refresh`.

    Attributes:
        path: the folder of the index.
        folder: what is indexed.

    Example:
        >>> index = Index.build("pictures", "pictures.index", model)
        >>> [hit.key for hit in index.search("a fox", 1)]
        ['fox.png']
        >>> str(index.update())
        '0 added, 0 changed, 0 removed, 1 kept'
    """

    def __init__(self, path: str | os.PathLike, *, model: VLM2Vec | None = None, load: Callable[[str], VLM2Vec] | None = None):
        """See `open` and `build`, which give one that holds something."""
        self.path = Path(os.path.abspath(path))
        self._model, self._load = model, load
        self._checked: tuple | None = None
        self._files: tuple[Any, dict[str, str]] = (None, {})
        self._state = read_state(self.path) if is_index(self.path) else None

    @classmethod
    def open(cls, path: str | os.PathLike, *, model: VLM2Vec | None = None, load: Callable[[str], VLM2Vec] | None = None) -> Index:
        """An index that is there. Its checksums are looked at, a second for every GB.

        Args:
            model: embeds queries and what is added. load: gives it by its name when it is first needed.
                With neither, the model that made the index is loaded as `VLM2Vec.from_pretrained` does.

        Raises:
            ValueError: no index there, damaged, or of another model than `model`.

        Example:
            >>> built = Index.build("pictures", "pictures.index", model)
            >>> index = Index.open("pictures.index", model=model)
            >>> len(index), index.dimensions == model.embedding_dim
            (1, True)
        """
        if not is_index(path):
            raise ValueError(f"{path}: no index in it; make one with vlm2vec index DIR -o {path}")
        index = cls(path, model=model, load=load)
        if model is not None:
            index.require_model(model)
        index.search_vectors(torch.zeros(1, index.dimensions), 1)  # what is imported by a first search is imported now
        return index

    @classmethod
    def build(cls, folder: str | os.PathLike, path: str | os.PathLike, model: VLM2Vec, **options: Any) -> Index:
        """Index a folder of pictures, films and texts, or a .jsonl of rows, into the folder `path`; `options` as of `update`.

        Where `path` holds an index it is updated.

        Raises:
            ValueError: as `update`.
        """
        index = cls(path, model=model)
        index.update(folder, **options)
        return index

    # -- facts ----------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._state) if self._state is not None else 0

    @property
    def about(self) -> dict[str, Any]:
        """What index.json says."""
        return dict(self._state.about) if self._state is not None else {}

    @property
    def folder(self) -> str:
        return self.about.get("folder", "")

    @property
    def dimensions(self) -> int:
        """Numbers of a vector."""
        return self.about.get("dimensions", 0)

    @property
    def model(self) -> VLM2Vec:
        """The model, loaded when it is first asked for. ValueError where it is not the one that made the index."""
        model = self._loaded()
        self.require_model(model)
        return model

    def _loaded(self) -> VLM2Vec:
        if self._model is None:
            made = self.about.get("model", "")
            if self._load is None:
                from vlm2vec.model import VLM2Vec

                self._model = VLM2Vec.from_pretrained(made)
            else:
                self._model = self._load(made)
        return self._model

    def require_model(self, model: VLM2Vec) -> None:
        """ValueError where another model made the index, by the names of what differs; weights are read once for it."""
        if self._state is not None and self._checked != (id(model), self._state.about["identity"]["weights"]):
            self._compare(model, identity.whole(model))

    def _compare(self, model: VLM2Vec, now: dict[str, Any]) -> None:
        about = self._state.about
        name = getattr(model, "source", "") or "the model at hand"
        made, its = (identity.compared(one) for one in (about["identity"], now))
        wrong = identity.mismatch(made, its, str(self.path), about.get("model"), name, "index anew")
        if wrong:
            raise ValueError(wrong)
        self._checked = (id(model), about["identity"]["weights"])

    # -- searching ------------------------------------------------------------------------------------------------------

    def search(self, query: Any, k: int = 5, *, prompt: str | None = None) -> list[Hit]:
        """The k entries that fit a query best, best first.

        Args:
            query: whatever `VLM2Vec.encode` takes as one input: a text, a picture (a path object, PIL, bytes), {"text":, "image":}.
            k: at most so many.
            prompt: of the query; None: the model's own for queries, else MMEB's words.

        Raises:
            ValueError: a query that cannot be read, k below 1, another model.

        Example:
            >>> index = Index.build("pictures", "pictures.index", model)
            >>> hit = index.search(Path("fox.png"), 1)[0]
            >>> hit.key, hit.kind, -1 < hit.score < 1
            ('fox.png', 'image', True)
        """
        inputs, said = said_as(self.model, [query], "query") if prompt is None else ([query], prompt)
        return self.search_vectors(self.model.encode(inputs, prompt=said, convert_to_tensor=True), k)[0]

    def search_vectors(self, vectors: torch.Tensor | np.ndarray, k: int = 5) -> list[list[Hit]]:
        """The k best entries of each of (Q, D) vectors, best first; of equal scores the one that was indexed first.

        Raises:
            ValueError: vectors of another width, k below 1.
        """
        state = self._state
        if state is None:
            raise ValueError(f"{self.path}: nothing is indexed yet; say Index.build(folder, path, model)")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k={shown(k)}: expected an integer of at least 1")
        vectors = torch.as_tensor(vectors).detach().to("cpu", torch.float32)
        if vectors.dim() != 2 or vectors.shape[1] != self.dimensions:
            raise ValueError(f"vectors of shape {tuple(vectors.shape)}: expected (Q, {self.dimensions}), the index's width")
        scores, places = nearest(vectors, [segment.vectors for segment in state.segments], k)
        return [[self._hit(state.rows[place], score) for score, place in zip(*row)] for row in zip(scores.tolist(), places.tolist())]

    def _hit(self, row: Row, score: float) -> Hit:
        return Hit(row.key, score, row.kind, self._found(row.file), row.text)

    def file_of(self, key: str) -> str | None:
        """The file to be shown of an entry, "" where it has none, None where the index holds no such key."""
        state = self._state
        if state is None:
            return None
        if self._files[0] is not state:
            self._files = (state, {row.key: row.file for row in state.rows})
        file = self._files[1].get(key)
        return file if file is None else self._found(file)

    def _found(self, file: str) -> str:
        return os.path.join(self._root(), file) if file else ""

    def _root(self) -> str:
        folder = self.folder
        return os.path.dirname(folder) if folder.lower().endswith(".jsonl") else folder

    # -- updating -------------------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Read the index anew where an update has replaced it; whether it did.

        Raises:
            ValueError: what lies there now is damaged, or of another model than what was opened, which is kept: vectors of
                queries that are at hand would be compared with strange ones.
        """
        if self._state is not None and signature(self.path) in ((), self._state.signature):
            return False
        self._take(read_state(self.path, verify=False))
        return True

    def _take(self, state: State) -> None:
        """Go on with a state that another process wrote. ValueError where it is another model's."""
        if self._state is not None:
            there, before = (identity.compared(one.about["identity"]) for one in (state, self._state))
            maker, opened = (one.about.get("model") for one in (state, self._state))
            wrong = identity.mismatch(there, before, str(self.path), maker, f"what was opened ({opened})", "open it anew")
            if wrong:
                raise ValueError(wrong)
        self._state = state

    def update(
        self,
        folder: str | os.PathLike | None = None,
        *,
        kinds: tuple[str, ...] | None = None,
        skip_bad: bool = False,
        batch_size: int = 32,
        encode: changes.Encode | None = None,
        progress: bool | None = None,
    ) -> changes.Changes:
        """Bring the index to what lies in its folder: new and changed files are embedded, those that are gone are dropped.

        A file is looked at by size and time first and by its content where these differ; a moved file keeps its vector. The index is
        replaced in one rename at the end: a kill before it leaves the old one, and the next update finds the vectors made so far.

        Args:
            folder: None for the one that was indexed; where that is gone, another may take its place.
            kinds: which of "image", "video" and "text" a folder's files are taken; None: as before, at first all.
            skip_bad: leave out what cannot be read.
            encode: embeds a list of inputs in the model's place.
            progress: None shows a bar on a terminal.

        Raises:
            ValueError: another update runs, another folder or model than before, a file that cannot be read.
        """
        with locked(self.path, "an update of an index"):
            if is_index(self.path) and (self._state is None or signature(self.path) != self._state.signature):
                self._take(read_state(self.path))
            old = self._state
            folder, kinds = self._what(folder, kinds)
            made = changes.plan(entries(folder, kinds), old, skip_bad)
            if not made.fresh and not made.kept:
                raise ValueError(_nothing(folder, kinds, made.changes))
            if made.idle and old is not None and (old.about["folder"], tuple(old.about["kinds"])) == (folder, kinds):
                return made.changes
            about = self._about(folder, kinds, old, bool(made.fresh))
            stream = changes.in_blocks(encode) if encode is not None else self._stream(batch_size)
            rows, names = changes.apply(
                made, self.path, old, stream, identity.digest(about["identity"]), skip_bad=skip_bad, progress=progress
            )
            if not rows:
                raise ValueError(_nothing(folder, kinds, made.changes))
            root = os.path.dirname(folder) if os.path.isfile(folder) else folder
            write_state(self.path, about, [_below(root, row) for row in rows], names)
            self._state = read_state(self.path, verify=False)
        return made.changes

    def _what(self, folder: str | os.PathLike | None, kinds: tuple[str, ...] | None) -> tuple[str, tuple[str, ...]]:
        """What is indexed: the folder and its kinds, from now on and before."""
        before = self.folder
        if folder is None and not before:
            raise ValueError(f"{self.path}: no index there yet; say which folder to index")
        folder = os.path.abspath(folder) if folder is not None else before
        if before and folder != before and os.path.exists(before):
            raise ValueError(f"{self.path} is the index of {before}, not of {folder}; give the new one another name, or remove the old")
        kinds = kinds or tuple(self.about.get("kinds", KINDS))
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"kinds={shown(list(kinds))}: expected some of {', '.join(KINDS)}")
        return folder, tuple(kind for kind in KINDS if kind in kinds)

    def _about(self, folder: str, kinds: tuple[str, ...], old: Any, embeds: bool) -> dict[str, Any]:
        """What index.json will say. The model is asked only where something is to be embedded."""
        about = {"folder": folder, "kinds": list(kinds)}
        if old is not None and not embeds:
            return {**old.about, **about}
        model = self._loaded()
        now = identity.whole(model)
        if old is not None:
            self._compare(model, now)
            other = identity.other_parts(old.about["identity"], now)
            if other:
                raise ValueError(f"{self.path} was made with other {', '.join(other)} of the model; give the same options, or index anew")
        source = getattr(model, "source", "")
        source = os.path.abspath(source) if os.path.isdir(source) else source
        return {**about, "model": source, "as": "document", "dimensions": model.embedding_dim, "identity": now}

    def _stream(self, batch_size: int) -> changes.Stream:
        """`encode_stream` of the model, with the words of documents around the inputs."""

        def stream(inputs: Iterator[Any]) -> Iterator[changes.Some]:
            prompt = self.model.prompts.get("document")
            if not prompt:
                inputs = (said_as(self.model, [x], "document")[0][0] for x in inputs)
            return encoding.encode_stream(self.model, inputs, prompt=prompt or None, batch_size=batch_size, skip_bad=True)

        return stream


def _below(root: str, row: Row) -> Row:
    """A row whose file is named from the indexed folder, so that the folder may move."""
    if not row.file or not os.path.isabs(row.file):
        return row
    inside = os.path.relpath(row.file, root)
    return row if inside.startswith("..") else Row(row.key, row.kind, row.stamp, row.content, inside, row.text)


def _nothing(folder: str, kinds: tuple[str, ...], done: changes.Changes) -> str:
    if done.left_out:
        key, why = next(iter(done.left_out.items()))
        return f"{folder}: none of the {len(done.left_out)} inputs can be read, {key} because of: {why}"
    endings = ", ".join(ending for kind in kinds for ending in KINDS[kind])
    return f"{folder}: nothing to index in it ({endings}); an index whose files are all gone is removed by hand"
