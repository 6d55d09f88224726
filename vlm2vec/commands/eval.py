"""`vlm2vec eval MODEL --data DIR --images DIR --output DIR`: MMEB, MMEB-V2, or any folder in their layouts."""

from pathlib import Path


def add_arguments(parser):
    parser.add_argument("model", nargs="?", help="checkpoint folder or hub name")
    parser.add_argument("--data", help="folder with one sub-folder per data set")
    parser.add_argument("--images", "--media", dest="media", help="folder that image and frame paths are relative to (default: DATA)")
    parser.add_argument("--output", help="folder for scores, predictions, summary and report")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="NAME|FILE.yaml",
                        help="data sets, groups, meta-tasks or modalities to run, and YAML files with tasks of your own")
    parser.add_argument("--list", action="store_true", help="show the 78 published tasks with metric and published scores, and stop")
    parser.add_argument("--protocol", choices=("v1", "v2"), default="v1", help="candidate keys and files of MMEB (v1) or MMEB-V2 (v2)")
    parser.add_argument("--hub", action="store_true", help="read annotations that DATA lacks from the hub")
    parser.add_argument("--store", help="embedding store, shared between runs (default: OUTPUT/embeddings)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--prompt", help="text put in front of every input (the data usually holds its own)")
    parser.add_argument("--top", type=int, default=100, help="candidates kept per query in the prediction files (default 100)")
    parser.add_argument("--strict", action="store_true", help="refuse a task with unreadable files or rows without an answer")
    parser.add_argument("--base", help="base model of a PEFT adapter, when its config names another")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, ... (default: the model's)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: a GPU when there is one)")
    parser.add_argument("--no-report", action="store_true", help="skip report.html")


def _need(args):
    for name in ("model", "output"):
        if not getattr(args, name):
            raise ValueError(f"vlm2vec eval needs {'a MODEL' if name == 'model' else '--' + name}; or --list to see the tasks")
    if not args.data and not args.hub:
        raise ValueError("vlm2vec eval needs --data DIR with one sub-folder per data set, or --hub")
    if args.top < 1 or args.batch_size < 1:
        raise ValueError(f"--top and --batch-size are at least 1, got {args.top} and {args.batch_size}")


def _tasks(args):
    from vlm2vec.evaluation.tasks import find_tasks, load_tasks, read_task_file

    extra, names = {}, []
    for word in args.tasks:
        if word.endswith((".yaml", ".yml")):
            own = read_task_file(word)
            extra |= own
            names += list(own)
        else:
            names.append(word)
    if args.data:
        return find_tasks(args.data, names or None, extra) if not args.hub else _with_hub(args, names, extra)
    table = {**load_tasks(), **extra}
    return _chosen(table, names)


def _chosen(table, names):
    tasks = [t for t in table.values() if not names or any(n in (t.name, t.group, t.meta_task, t.modality) for n in names)]
    if not tasks:
        raise ValueError(f"no task, group or modality named {', '.join(names)}; see vlm2vec eval --list")
    return tasks


def _with_hub(args, names, extra):
    from vlm2vec.evaluation.tasks import find_tasks, load_tasks

    try:
        local = {t.name: t for t in find_tasks(args.data, None, extra)}
    except ValueError:
        local = {}
    return _chosen({**load_tasks(), **extra, **local}, names)


def run(args):
    from vlm2vec.evaluation.listing import list_tasks

    if args.list:
        print("\n".join(list_tasks()))
        return 0
    _need(args)
    tasks = _tasks(args)
    from vlm2vec.evaluation.distributed import local_device, process_group
    from vlm2vec.evaluation.runner import Options, run_tasks
    from vlm2vec.evaluation.summary import terminal, write_summary

    rank, world, barrier = process_group()
    model = _load(args, args.device or local_device())
    options = Options(
        protocol=args.protocol, hub=args.hub, strict=args.strict, batch_size=args.batch_size, prompt=args.prompt,
        top=args.top, rank=rank, world=world, barrier=barrier,
    )
    rows = run_tasks(model, tasks, args.data, args.media or args.data, args.output, store=args.store, options=options)
    if rank == 0:
        name = Path(args.model).name or args.model
        summary = write_summary(args.output, rows, name, {"protocol": args.protocol, "processes": world})
        print("\n".join(terminal(rows, summary["means"])))
        print(f"summary: {Path(args.output) / 'summary.md'}")
    return 0


def _load(args, device):
    import torch

    from vlm2vec import VLM2Vec

    options = {}
    if args.dtype:
        dtype = getattr(torch, args.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"--dtype is a torch dtype such as float32 or bfloat16, got {args.dtype!r}")
        options["dtype"] = dtype
    if args.base:
        options["base"] = args.base
    return VLM2Vec.from_pretrained(args.model, device=device, **options)
