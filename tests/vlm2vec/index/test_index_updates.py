"""An index follows its folder: new, changed, moved and removed files, each told and none embedded twice; whole after any kill."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.helpers.stub_model import WIDTH, StubModel, embed, vector
from vlm2vec.commands.common import images_below
from vlm2vec.data.bulk.inputs import stream
from vlm2vec.data.index import Index, segments, state
from vlm2vec.data.index.changes import in_blocks
from vlm2vec.files.locks import locked

PAST = 1_700_000_000


def put(folder, name, content, when=PAST):
    """A file that changed long ago, so that its time is trusted."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    os.utime(path, (when, when))
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    for i in range(10):
        put(folder, f"{i:02d}.png", f"picture {i}")
    put(folder, "more/note.txt", "a note")
    put(folder, "more/film.mp4", "a film")
    put(folder, "more/table.csv", "nothing to be found")
    return folder


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(segments, "ROWS", 4)
    monkeypatch.setattr("vlm2vec.data.index.changes.ROWS", 4)
    monkeypatch.setattr("vlm2vec.data.index.changes.BLOCK", 3)


def counted(index, folder=None, **options):
    """(added, changed, removed, kept, embedded) of an update."""
    done = index.update(folder, encode=embed, **options)
    return done.added, done.changed, done.removed, done.kept, done.embedded


def held(index):
    """{key: vector} of an index, found by searching for each vector of the folder."""
    found = index._state
    vectors = torch.cat([segment.vectors for segment in found.segments])
    return {row.key: vectors[i] for i, row in enumerate(found.rows)}


def require_true(index, folder):
    """Every file of the folder has its own content's vector, and nothing else is there."""
    wanted = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".png", ".txt", ".mp4")}
    got = held(index)
    assert set(got) == set(wanted)
    for key, content in wanted.items():
        assert torch.equal(got[key], vector(content)), key


def test_every_kind_of_change(folder, tmp_path, few_rows):
    index = Index(tmp_path / "i", model=StubModel())
    assert counted(index, folder) == (12, 0, 0, 0, 12)
    require_true(index, folder)
    assert counted(index) == (0, 0, 0, 12, 0)
    put(folder, "new.png", "a new picture")
    put(folder, "03.png", "another picture 3", PAST + 9)
    (folder / "05.png").unlink()
    os.utime(folder / "07.png", (PAST + 5, PAST + 5))  # touched, not changed
    assert counted(index) == (1, 1, 1, 10, 2)
    require_true(index, folder)
    (folder / "08.png").rename(folder / "more" / "eight.png")
    shutil.copy2(folder / "01.png", folder / "twin.png")
    assert counted(index) == (2, 0, 1, 11, 0), "a moved file and a copy keep their vector"
    require_true(index, folder)
    require_true(Index.open(tmp_path / "i"), folder)
    named = {"index.json", index.about["rows"], *index.about["segments"]}
    assert set(os.listdir(tmp_path / "i")) == named, "nothing of the old index is left"


def test_two_files_of_one_content_are_embedded_once(tmp_path):
    for name in "ab":
        put(tmp_path / "pictures", f"{name}.png", "the same")
    index = Index(tmp_path / "i", model=StubModel())
    assert counted(index, tmp_path / "pictures") == (2, 0, 0, 0, 1)
    hits = index.search_vectors(vector("the same")[None], 5)[0]
    assert [hit.key for hit in hits] == ["a.png", "b.png"], "equal scores come in the order of the paths"
    assert [hit.score for hit in hits] == pytest.approx([1, 1])


def test_a_change_that_keeps_size_and_time_of_a_fresh_file_is_seen(tmp_path):
    file = tmp_path / "pictures/a.png"
    file.parent.mkdir()
    file.write_text("first")
    index = Index(tmp_path / "i", model=StubModel())
    counted(index, tmp_path / "pictures")
    before = file.stat()
    file.write_text("other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert counted(index) == (0, 1, 0, 0, 1)


def test_search_is_exact_through_many_segments(tmp_path, few_rows):
    for i in range(23):
        put(tmp_path / "pictures", f"{i:02d}.png", f"content {i}")
    index = Index(tmp_path / "i", model=StubModel())
    counted(index, tmp_path / "pictures")
    assert len(index.about["segments"]) == 6
    queries = torch.stack([vector(f"query {i}") for i in range(3)])
    truth = queries.double() @ torch.stack([vector(f"content {i}") for i in range(23)]).double().T
    for k in (1, 5, 23, 99):
        for row, hits in zip(truth, index.search_vectors(queries, k)):
            order = row.sort(descending=True, stable=True).indices[:k].tolist()
            assert [hit.key for hit in hits] == [f"{i:02d}.png" for i in order]
            assert [hit.score for hit in hits] == pytest.approx(row[order].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("queries", "k", "said"), [(torch.zeros(1, 5), 1, "expected (Q, 12)"), (torch.zeros(1, WIDTH), 0, "k=0: expected")]
)
def test_what_cannot_be_searched(folder, tmp_path, queries, k, said):
    index = Index(tmp_path / "i", model=StubModel())
    with pytest.raises(ValueError, match="nothing is indexed yet"):
        index.search_vectors(queries, 1)
    counted(index, folder)
    with pytest.raises(ValueError) as e:
        index.search_vectors(queries, k)
    assert said in str(e.value)


def test_what_cannot_be_read_is_refused_or_left_out(folder, tmp_path):
    index = Index(tmp_path / "i", model=StubModel())
    put(folder, "cut.png", "BAD")
    put(folder, "03.png", "BAD too")
    with pytest.raises(ValueError, match=r"03.png: not an image; mend it, or say --skip-bad"):
        counted(index, folder)
    assert not (tmp_path / "i" / "index.json").exists()
    done = index.update(folder, encode=embed, skip_bad=True)
    assert (done.added, set(done.left_out)) == (11, {"cut.png", "03.png"})
    put(folder, "04.png", "BAD now", PAST + 3)  # what was there of it goes
    done = index.update(encode=embed, skip_bad=True)
    assert (done.added, done.changed, done.removed, done.kept) == (0, 0, 1, 10) and "04.png" not in held(index)


def test_another_model_and_other_options_are_refused_by_name(folder, tmp_path):
    counted(Index(tmp_path / "i", model=StubModel(source="a")), folder)
    put(folder, "new.png", "new")
    with pytest.raises(ValueError, match=r"was made by another model \(a\) than b: other weights; index anew"):
        counted(Index(tmp_path / "i", model=StubModel("two", source="b")))
    with pytest.raises(ValueError, match="was made by another model"):
        Index.open(tmp_path / "i", model=StubModel("two"))
    with pytest.raises(ValueError, match="made with other options of the model"):
        counted(Index(tmp_path / "i", model=StubModel(max_pixels=3136)))
    assert len(Index.open(tmp_path / "i", model=StubModel())) == 12


def test_another_folder_is_refused_unless_the_first_is_gone(folder, tmp_path):
    index = Index(tmp_path / "i", model=StubModel())
    counted(index, folder)
    put(tmp_path / "others", "a.png", "a")
    with pytest.raises(ValueError, match="is the index of .*pictures, not of .*others"):
        counted(index, tmp_path / "others")
    folder.rename(tmp_path / "moved")
    assert counted(index, tmp_path / "moved") == (0, 0, 0, 12, 0)
    assert index.search_vectors(vector("picture 1")[None], 1)[0][0].file == str(tmp_path / "moved/01.png")


def test_one_writer_at_a_time(folder, tmp_path):
    index = Index(tmp_path / "i", model=StubModel())
    told = []

    def other():
        try:
            Index(tmp_path / "i", model=StubModel()).update(folder, encode=embed)
        except ValueError as e:
            told.append(str(e))

    with locked(tmp_path / "i", "an update of an index"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(told) == 1 and "is in use" in told[0]
    counted(index, folder)


@pytest.mark.parametrize("which", ["vectors", "rows"])
def test_damage_is_told(folder, tmp_path, which):
    counted(Index(tmp_path / "i", model=StubModel()), folder)
    (path,) = (tmp_path / "i").glob(f"{which}-*")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}.* is damaged"):
        Index.open(tmp_path / "i")


def test_an_open_index_goes_on_and_refreshes(folder, tmp_path, few_rows):
    writer = Index(tmp_path / "i", model=StubModel())
    counted(writer, folder)
    reader = Index.open(tmp_path / "i")
    assert not reader.refresh()
    put(folder, "new.png", "new")
    (folder / "00.png").unlink()
    counted(writer)
    assert reader.search_vectors(vector("picture 0")[None], 1)[0][0].score == pytest.approx(1), "it has what it opened"
    assert reader.refresh() and not reader.refresh()
    assert reader.search_vectors(vector("new")[None], 1)[0][0].key == "new.png" and reader.file_of("00.png") is None


def test_readers_meet_a_whole_index_while_it_is_updated(folder, tmp_path, few_rows):
    writer = Index(tmp_path / "i", model=StubModel())
    counted(writer, folder)
    told, ended = [], threading.Event()

    def read():
        reader = Index.open(tmp_path / "i")
        while not ended.is_set():
            for index in (reader, Index.open(tmp_path / "i")):
                index.refresh()
                hit = index.search_vectors(vector("picture 4")[None], 1)[0][0]
                if (hit.key, len(index) in (12, 13)) != ("04.png", True):
                    told.append((hit, len(index)))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            for i in range(12):
                put(folder, f"new{i}.png", f"new {i}")
                counted(writer)
                (folder / f"new{i}.png").unlink()
                counted(writer)
        finally:
            ended.set()
        reading.result(60)
    assert not told


def killed_at(number, run):
    """Runs in a child that is killed at its `number`-th rename; whether it was."""
    child = os.fork()
    if not child:
        count, replace = [0], os.replace

        def counting(*names):
            count[0] += 1
            if count[0] == number:
                os._exit(9)
            replace(*names)

        os.replace = counting
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_rename_leaves_the_old_index_or_the_new(folder, tmp_path, few_rows):
    counted(Index(tmp_path / "first", model=StubModel()), folder)
    before = held(Index.open(tmp_path / "first"))
    for i in range(9):
        put(folder, f"new{i}.png", f"new {i}")
    put(folder, "03.png", "another 3", PAST + 9)
    kills = 0
    for number in range(1, 40):
        place = tmp_path / f"killed{number}"
        shutil.copytree(tmp_path / "first", place)
        if not killed_at(number, lambda: Index(place, model=StubModel()).update(encode=embed)):
            break
        kills += 1
        index = Index(place, model=StubModel())
        got = held(index)
        assert got.keys() == before.keys() and all(torch.equal(got[key], before[key]) for key in before)
        embedded = counted(index)[-1]
        require_true(index, folder)
        if number > 4:
            assert embedded < 10, "vectors that a killed update has written are not made again"
    assert kills >= 5, "segments, rows and index.json are renamed one by one"


def test_no_index_and_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no index in it; make one with vlm2vec index"):
        Index.open(tmp_path)
    with pytest.raises(ValueError, match="say which folder to index"):
        Index(tmp_path / "i", model=StubModel()).update(encode=embed)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to index in it"):
        Index(tmp_path / "i", model=StubModel()).update(tmp_path / "empty", encode=embed)
    (tmp_path / "i").mkdir(exist_ok=True)
    (tmp_path / "i" / state.MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format a number 99, expected 1"):
        Index.open(tmp_path / "i")


def test_another_models_index_in_its_place_is_told(folder, tmp_path):
    """Vectors of one model are never compared with another's: what was opened is kept, and the reason said."""
    index = Index(tmp_path / "i", model=StubModel())
    index.update(folder, encode=embed)
    opened = Index.open(tmp_path / "i", model=StubModel())
    shutil.rmtree(tmp_path / "i")
    put(folder, "new.png", "new")
    Index(tmp_path / "i", model=StubModel("two")).update(folder, encode=embed)
    for again in (opened.refresh, lambda: opened.update(encode=embed)):
        with pytest.raises(ValueError, match="made by another model .* other weights; open it anew"):
            again()
    assert len(opened) == 12 and opened.search_vectors(vector("picture 3")[None], 1)[0][0].key == "03.png"
    shutil.rmtree(tmp_path / "i")
    Index(tmp_path / "i", model=StubModel()).update(folder, encode=embed)
    assert opened.refresh() and len(opened) == 13


def test_links_are_followed_and_hidden_names_left_out(folder, tmp_path):
    """Shared storage links folders in; systems leave files whose names begin with a dot. Index, shards and `embed` see the same."""
    elsewhere = tmp_path / "elsewhere"
    put(elsewhere, "a.png", "linked")
    (folder / "train").symlink_to(elsewhere)
    (folder / "more/up").symlink_to(folder)  # without end, if it were followed
    (elsewhere / "back").symlink_to(elsewhere)
    for hidden in ("._00.png", ".thumbs/00.png", "more/.a.png"):
        put(folder, hidden, "hidden")
    wanted = [*(f"{i:02d}.png" for i in range(10)), "more/film.mp4", "train/a.png"]
    index = Index(tmp_path / "i", model=StubModel())
    index.update(folder, encode=embed)
    assert sorted(held(index)) == sorted([*wanted, "more/note.txt"])
    assert [key for key, _ in stream([str(folder)], [])] == [str(folder / key) for key in wanted]
    assert images_below(str(folder)) == [str(folder / key) for key in wanted if key.endswith(".png")]


def test_an_update_embeds_in_one_stream(folder, tmp_path, monkeypatch, few_rows):
    """One stream reads the next pictures while the model is at these; a call for every few would wait for each other."""
    calls = []

    def stream(model, inputs, **options):
        calls.append(options)
        yield from in_blocks(embed)(inputs)

    monkeypatch.setattr("vlm2vec.encoding.encode_stream", stream)
    model = StubModel()
    model.prompts = {"document": "said"}
    index = Index(tmp_path / "i", model=model)
    assert index.update(folder, batch_size=5).embedded == 12
    assert calls == [{"prompt": "said", "batch_size": 5, "skip_bad": True}]
    require_true(index, folder)
