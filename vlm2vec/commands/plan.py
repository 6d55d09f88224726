"""`vlm2vec plan RECIPE [--gpu NAME] [--best | --all]`: the trainer's plan, `vlm2vec train plan`."""

from .train import main as train


def main(argv: list[str]) -> int:
    """Exit code of the plan."""
    return train(["plan", *argv])
