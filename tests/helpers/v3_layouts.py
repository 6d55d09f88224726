"""A small folder in MMEB-V3's layout, every kind of loader in it, with the scores that its angles give (tests.helpers.angles)."""

import csv
import io
import json
from math import log2
from pathlib import Path

from tests.helpers.angles import film, picture, sound
from tests.helpers.evaluation_layouts import parquet

SECOND, THIRD = 1 / log2(3), 1 / 2  # discounts of ranks 2 and 3


def lines(path: Path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(path: Path, *rows) -> None:
    """A parquet file of rows; a key that a row lacks is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    parquet(path, **{name: [row.get(name) for row in rows] for name in names})


def bright(root):
    """No judgements file; gold_ids, else gold_ids_long; excluded ids, of which the authors' own score hears."""
    base = root / "text-tasks" / "BRIGHT"
    table(
        base / "examples" / "aops-00000-of-00001.parquet",
        {"id": "q0", "query": "angle:3", "gold_ids": ["d1"], "gold_ids_long": ["d2"], "excluded_ids": ["d0", "unknown"]},
        {"id": "q1", "query": "angle:92.5", "gold_ids": None, "gold_ids_long": ["d2", "d3"], "excluded_ids": ["N/A"]},
        {"id": "q2", "query": "", "gold_ids": ["d0"], "gold_ids_long": None, "excluded_ids": ["N/A"]},
    )
    documents = [{"id": f"d{i}", "content": f"angle:{a}"} for i, a in enumerate((0, 20, 90, 94))] + [{"id": "d4", "content": ""}]
    table(base / "documents" / "aops-00000-of-00001.parquet", *documents)
    # q0: d0, d1 (right), ...; q1: d3, d2, both right; q2 and d4 have no text
    return {"text/BRIGHT/aops": {"ndcg_linear@5": (SECOND + 1) / 2, "hit@1": 1 / 2, "without_excluded": 1.0}}


def follow_ir(root):
    """Integer ids, 0 among them, graded judgements, an instruction before the query; og and changed judgements."""
    base = root / "text-tasks" / "FollowIR" / "core17-instructions"
    lines(
        base / "queries.jsonl",
        {"_id": 0, "text": "angle:12", "instruction_og": "Only courts.", "instruction_changed": "Only banks."},
        {"_id": 1, "text": "angle:58", "instruction_og": "Only courts.", "instruction_changed": "Only banks."},
    )
    lines(
        base / "corpus.jsonl",
        {"_id": 0, "title": "Zero", "text": "angle:10"},
        {"_id": 1, "title": "", "text": "angle:30"},
        {"_id": "two", "text": "angle:60"},
    )
    lines(
        base / "qrels_og" / "test.jsonl",
        {"query_id": 0, "corpus_id": 1, "score": 1},
        {"query_id": "0", "corpus_id": "1", "score": 2},  # the last row of a pair holds
        {"query_id": 0, "corpus_id": 0, "score": 1},
        {"query_id": 1, "corpus_id": "two", "score": 1},
    )
    changed = base / "qrels_changed" / "test.tsv"
    changed.parent.mkdir(parents=True, exist_ok=True)
    changed.write_text("query-id\tcorpus-id\tscore\n0\ttwo\t1\n1\ttwo\t0\n", encoding="utf-8")
    # query 0: documents 0, 1, two; query 1: two first
    official = (1 + 2 * SECOND) / (2 + SECOND)
    return {
        "text/FollowIR/core17-instructions": {"ndcg_linear@5": (official + 1) / 2, "hit@1": 1.0},
        "wemm": {"text/FollowIR/core17-instructions": {"ndcg_linear@5": (THIRD + 0) / 2, "hit@1": 0.0}},
    }


def nano(root):
    """NanoBEIR: three parquet files."""
    base = root / "text-tasks" / "NanoBEIR" / "NanoNQ"
    table(base / "queries" / "train-00000-of-00001.parquet", {"_id": "a", "text": "angle:40"}, {"_id": "b", "text": "angle:80"})
    table(base / "corpus" / "train-00000-of-00001.parquet", {"_id": "x", "text": "angle:41"}, {"_id": "y", "text": "angle:50"})
    judged = [{"query-id": "a", "corpus-id": "x"}, {"query-id": "b", "corpus-id": "x"}]
    table(base / "qrels" / "train-00000-of-00001.parquet", *judged)
    return {"text/NanoBEIR/NanoNQ": {"ndcg_linear@5": (1 + SECOND) / 2, "hit@1": 1 / 2}}


def tools(root):
    """Several right tools; documentation as JSON text; every tool of the category is a candidate."""
    base = root / "tool-tasks"
    right = [json.dumps([{"id": name, "doc": {}, "relevance": 1} for name in names]) for names in (["t1", "t2"], ["t0"])]
    table(
        base / "ToolDe-Queries" / "web" / "apibank" / "queries-00000-of-00001.parquet",
        {"id": "q0", "query": "angle:33", "instruction": "Find a tool.", "labels": right[0], "category": "web"},
        {"id": "q1", "query": "angle:60", "instruction": "Find a tool.", "labels": right[1], "category": "web"},
    )
    shown = [{"name": f"n{i}", "description": f"angle:{a} é", "parameters": {"a": 1}} for i, a in enumerate((10, 30, 90))]
    table(
        base / "ToolDe-Candidates" / "web" / "tools-00000-of-00001.parquet",
        *({"id": f"t{i}", "documentation": json.dumps(value)} for i, value in enumerate(shown)),
    )
    # q0: t1 (right); q1: t1 and t2 are as near, t1 stands first; t0 is right
    return {"toolde/web/apibank": {"hit@1": 1 / 2, "hit@5": 1.0}}


def screens(root):
    """Several screenshots a side, ids that stand twice, ids that are query and candidate, sides without a picture."""
    base, shots = root / "gui-tasks" / "GAE-GUIAct", root / "gui-tasks" / "GUIAct"
    for name, angle in (("p10", 10), ("p11", 11), ("p80", 80), ("p150", 150)):
        picture(shots / "guiact" / f"{name}.png", angle)
    stored = (
        {"cand_id": "c1", "cand_text": "<|image_1|> then <|image_1|>", "cand_image_path": "['guiact/p10.png', 'guiact/p11.png']"},
        {"cand_id": "c2", "cand_text": "angle:40", "cand_image_path": ""},
        {"cand_id": "c3", "cand_text": "<|image_1|> last", "cand_image_path": "guiact/p80.png"},
        {"cand_id": "c4", "cand_text": "<|image_1|> " * 10, "cand_image_path": str(["guiact/p150.png"] * 10)},  # a trajectory
    )
    table(base / "corpus" / "q2s-00000.parquet", *stored)
    sides = {row["cand_id"]: {"pos_text": row["cand_text"], "pos_image_path": row["cand_image_path"]} for row in stored}

    def query(name, text, right):
        side = {"qry_id": name, "qry_text": text, "qry_image_path": "", "retrieval_type": "q2s"}
        return {**side, "pos_id": right, **sides[right]}

    table(
        base / "queries" / "q2s-00000.parquet",
        query("a", "angle:12", "c1"),
        query("a", "angle:75", "c3"),
        query("b", "angle:38", "c1"),  # c2 is nearer
        query("c2", "angle:85", "c3"),
    )
    # merged: a (12) finds c1 where c3 is right; b finds c1; c2 has its candidate's angle, 40, and finds c1 where c3 is right
    return {"GAE-GUIAct_q2s": {"hit@1": 3 / 4}, "wemm": {"GAE-GUIAct_q2s": {"hit@1": 1 / 3}}}


def memories(root):
    """Two parts with equal ids, judgements of three forms; own lists, of which only the other evaluation hears."""
    base = root / "memory-tasks"
    told = {"PeerQA": {"one": "Find the answer.", "PeerQA": "Find anything."}}
    lines(base / "task_instructions.json", told)
    one, two = base / "Semantic" / "PeerQA" / "one", base / "Semantic" / "PeerQA" / "two"
    lines(one / "queries.jsonl", {"id": "q", "text": "angle:20"})
    lines(one / "corpus.jsonl", {"id": "d", "text": "angle:50"}, {"id": "e", "title": "E", "text": "angle:28"})
    (one / "qrels.tsv").write_text("q\tQ0\td\t1\n", encoding="utf-8")
    lines(one / "candidates.jsonl", {"scene_id": "q", "candidate_doc_ids": ["d"]})
    table(two / "query.parquet", {"id": "q", "text": "angle:70", "scene_id": 7})
    table(two / "documents.parquet", {"id": "d", "text": "angle:69"}, {"id": "f", "text": "angle:71.5"})
    lines(two / "qrels" / "test.jsonl", {"query_id": "q", "corpus_id": "d", "score": 1})
    lines(two / "candidates.jsonl", {"scene_id": 7, "candidate_doc_ids": ["f", "d"]})
    # everything: one's q finds e, two's q finds d; inside of its own list one's q finds d too
    return {"memory/PeerQA": {"hit@1": 1 / 2}, "wemm": {"memory/PeerQA": {"hit@1": 1.0}}}


def products(root):
    """Pictures by the file name of an address; several positives, as a list or as JSON text; one product without a picture."""
    base = root / "image-tasks" / "MCMR"
    picture(base / "images" / "a.jpg", 10)
    picture(base / "images" / "b.jpg", 60)
    lines(
        base / "candidates.jsonl",
        {
            "candidate_id": 1,
            "title": "A",
            "description": ["one", "two"],
            "features": ["f", "g"],
            "price": "9",
            "images": [{"url": "http://x/y/a.jpg?s=1"}],
        },
        {
            "candidate_id": "2",
            "title": "B",
            "description": [],
            "features": [],
            "price": None,
            "images": ["http://x/none.jpg", "http://x/b.jpg"],
        },
        {"candidate_id": 3, "title": "C", "Date First Available": "May", "images": ["http://x/none.jpg"]},
    )
    lines(
        base / "query.jsonl",
        {"qid": 0, "query": "angle:15", "pos_ids": '["2", 1]'},
        {"qid": "1", "query": "angle:30", "pos_ids": [2]},
        {"qid": 2, "query": "angle:160", "pos_ids": ["3"]},  # fed as text alone, which shows no angle: 170
    )
    # 0: product 1; 1: product 1 where 2 is right; 2: product 3, which the other evaluation cannot read, so the row is wrong
    return {"MCMR": {"hit@1": 2 / 3}, "wemm": {"MCMR": {"hit@1": 1 / 3}}}


def page(angle):
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16), (angle, 50, 50)).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def documents(root, folder="visdoc-tasks/data/docvqa_test_subsampled_beir"):
    """Integer ids, 0 among them, as ViDoRe has them."""
    base = root / folder
    pages = {"corpus-id": [0, 1, 2], "image": [page(0), page(30), page(60)]}
    parquet(base / "corpus" / "test-00000.parquet", **pages)
    parquet(base / "queries" / "test-00000.parquet", **{"query-id": [0, 1], "query": ["angle:2", "angle:40"]})
    parquet(base / "qrels" / "test-00000.parquet", **{"query-id": [0, 1, 1], "corpus-id": [0, 2, 1], "score": [1, 2, 1]})
    # query 1: page 1 (grade 1), page 2 (grade 2), page 0
    graded = (1 + 2 * SECOND) / (2 + SECOND)
    return {"ViDoRe_docvqa": {"ndcg_linear@5": (1 + graded) / 2, "hit@1": 1.0}}


def images(root):
    """MMEB's rows, pictures in a folder of their own."""
    for name, angle in (("a", 25), ("b", 70)):
        picture(root / "image-tasks" / "MMEB" / "ImageNet-A" / f"{name}.png", angle)
    parquet(
        root / "image-query" / "ImageNet-A" / "test-00000.parquet",
        qry_text=["<|image_1|>\nRepresent the given image for classification\n"] * 2,
        qry_img_path=["ImageNet-A/a.png", "ImageNet-A/b.png"],
        tgt_text=[["angle:20", "angle:60"], ["angle:20", "angle:60"]],
        tgt_img_path=[["", ""], ["", ""]],
    )
    return {"ImageNet-A": {"hit@1": 1 / 2}}


def films(root):
    """One file of JSON lines, and one JSON list a subset."""
    frames = root / "video-tasks" / "frames"
    film(frames / "video_cls" / "Breakfast" / "v", 5)
    lines(root / "video-tasks" / "data" / "breakfast.jsonl", {"video_id": "v", "pos_text": "milk"})
    film(frames / "video_qa" / "video_qa" / "MVBench" / "state_change" / "a.mp4", 50)
    for subset in MVBENCH:
        rows = [{"video": "a.mp4", "question": "What", "candidates": ["ice", "angle:49"], "answer": "angle:49"}]
        path = root / "video-tasks" / "data" / "mvbench" / f"{subset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
        film(frames / "video_qa" / "video_qa" / "MVBench" / subset / "a.mp4", 50)
    # Breakfast: no label shows an angle, all are alike, and milk is not the first; the other evaluation ranks it alone
    return {"MVBench": {"hit@1": 1.0}, "Breakfast": {"hit@1": 0.0}, "wemm": {"Breakfast": {"hit@1": 1.0}}}


MVBENCH = (
    "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action object_existence "
    "object_interaction object_shuffle moving_direction action_localization scene_transition action_count moving_count moving_attribute "
    "state_change fine_grained_pose character_order egocentric_navigation counterfactual_inference"
).split()


def sounds(root):
    """Labels by ids, by a csv, and sorted; texts for sounds, sounds for films and pictures, parts of recordings."""
    base = root / "audio-tasks"

    def heard(name, *levels):
        return {"bytes": sound(base / "made" / f"{name}.wav", *levels).read_bytes(), "path": f"{name}.wav"}

    table(
        base / "nsynth-1k" / "eval" / "query.parquet",
        {"audio": heard("a", 30), "label": 2, "label_name": "angle:28"},
        {"audio": heard("b", 55), "label": 0, "label_name": "angle:90"},
        {"audio": heard("c", 85), "label": 0, "label_name": "angle:90"},
    )
    urban = base / "urbansound8k"
    sound(urban / "audio" / "fold3" / "x.wav", 100)
    rows = [["slice_file_name", "fold", "classID", "class"], ["x.wav", "3", "0", "angle:99"], ["gone.wav", "3", "1", "angle:10"]]
    (urban / "csv_files").mkdir(parents=True)
    with open(urban / "csv_files" / "test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    described = base / "sounddescs-1k" / "eval"
    table(described / "query-0.parquet", {"id": 0, "text": "angle:20"}, {"id": 1, "text": "angle:44"})
    table(described / "corpus-0.parquet", {"corpus-id": 0, "audio": heard("d", 18)}, {"corpus-id": 1, "audio": heard("e", 40)})
    judged = [(0, 0, 1), (1, 0, 2), (1, 1, 1)]
    table(described / "qrels-0.parquet", *({"query-id": q, "corpus-id": c, "score": s} for q, c, s in judged))
    sound(base / "clotho" / "evaluation" / "m.wav", 70)
    sound(base / "clotho" / "evaluation" / "n.wav", 110)
    captions = [["file_name", *(f"caption_{i}" for i in range(1, 6))]]
    captions += [["m.wav", "angle:71", "angle:72", "angle:95", "angle:69", "angle:60"], ["gone.wav", *["x"] * 5]]
    captions += [["n.wav", "angle:100", "angle:105", "angle:110", "angle:111", "angle:112"]]
    with open(base / "clotho" / "clotho_captions_evaluation.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(captions)
    ave = base / "AVE" / "AVE_Dataset"
    sound(ave / "audios" / "v1_0_5.wav", 33)
    sound(ave / "audios" / "v2_1_3.wav", 50)
    film(ave / "frames" / "v1", 30)
    film(ave / "frames" / "v2", 150)
    (ave / "testSet.txt").write_text("Dog&v1&good&0&5\nCat&v2&good&1&3\n", encoding="utf-8")
    coco = base / "speechcoco-1k"
    table(coco / "query-0.parquet", {"id": "s", "audio": heard("f", 120), "image_id": 5})
    table(coco / "corpus-0.parquet", {"corpus-id": 5, "image": page(118)}, {"corpus-id": 6, "image": page(10)})
    tut = base / "tutsound" / "TUT-sound-events-2017-development"
    # a recording of 6 s: 20 for 2 s, 60 for 2 s, 20 for 2 s; its mean is 33.3, but the queries' texts show their own angles
    sound(tut / "audio" / "r.wav", 20, 60, 20, seconds=2.0)
    told = "audio/r.wav\tstreet\t0.0\t2.0\tangle:22\naudio/r.wav\tstreet\t2.0\t4.0\tangle:61\naudio/r.wav\tstreet\t4.0\t4.0\tangle:22\n"
    for fold in (1, 2, 3, 4):
        path = tut / "evaluation_setup" / f"street_fold{fold}_evaluate.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(told if fold == 1 else "", encoding="utf-8")
    return {
        "NSynth": {"hit@1": 2 / 3},  # label 1 was never seen: the text "1" shows no angle; 55 is nearer to 28
        "UrbanSound8K": {"hit@1": 1 / 2},  # a file that is gone is wrong
        "SoundDescs": {"hit@1": 1 / 2},  # the positive of the highest grade alone is right: 0 for query 1
        "Clotho": {"hit@1": 9 / 10},  # 95 is nearer to n
        "AVE": {"hit@1": 1 / 2},
        "SpeechCOCO": {"hit@1": 1.0},
        "TUTSound": {"hit@1": 1.0},  # any part of the label
        "TUTSound(hard)": {"hit@1": 2 / 3},  # the third event's own part scores as the first's, which comes first
    }


KINDS = (bright, follow_ir, nano, tools, screens, memories, products, documents, images, films, sounds)


def everything(root):
    """All kinds below `root`. Returns ({task: {metric: score}}, the same for the other evaluation where it differs)."""
    official, other = {}, {}
    for kind in KINDS:
        expected = kind(root)
        other |= expected.pop("wemm", {})
        official |= expected
    return official, other
