"""MMEB and MMEB-V2 evaluation: tasks as data, an embedding store, ranking, score files and reports.

Imports stay lazy: `import vlm2vec.evaluation` costs nothing and needs no extra.
"""

_HOME = {
    "Task": "tasks",
    "load_tasks": "tasks",
    "find_tasks": "tasks",
    "load_task": "loaders",
    "EmbeddingStore": "encode.store",
    "rank": "score.ranking",
    "ranking_metrics": "score.metrics",
    "run_task": "runner",
    "run_tasks": "runner",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"vlm2vec.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vlm2vec.evaluation' has no attribute {name!r}")
