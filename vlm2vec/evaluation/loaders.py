"""Which function reads which kind of task. Adding a kind is one line here and one function."""

from importlib import import_module

LOADERS = {
    "mmeb": ("loader_image", "load_mmeb"),
    "video_labels": ("loader_video", "load_labels"),
    "video_choice": ("loader_video", "load_choice"),
    "video_retrieval": ("loader_video", "load_retrieval"),
    "moments": ("loader_moment", "load_moments"),
    "momentseeker": ("loader_moment", "load_momentseeker"),
    "documents": ("loader_document", "load_documents"),
}


def load_task(task, root, media, **options):
    """Read one task into a TaskData.

    Args:
        task: a Task. root: folder of annotation folders (None with hub=True). media: image root, or the folder that
            holds video-tasks/ for videos.
        options: hub (bool), protocol ("v1" or "v2"), cache (folder for frames and pages that have to be unpacked).
    """
    if task.loader not in LOADERS:
        raise ValueError(f"task {task.name}: unknown loader {task.loader!r}; known are {', '.join(LOADERS)}")
    module, function = LOADERS[task.loader]
    return getattr(import_module(f"vlm2vec.evaluation.{module}"), function)(task, root, media, **options)
