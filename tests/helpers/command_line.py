"""The two programs as a user meets them: exit code 2 and one short line for what can be mended, never a traceback."""

MOST = 500  # characters of a message


def call(capsys, *words) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `vlm2vec ...`, or of `train ...` where that is the first word."""
    from train.__main__ import main as train
    from vlm2vec.cli import main as vlm2vec

    words = [str(word) for word in words]
    capsys.readouterr()
    code = train(words[1:]) if words[0] == "train" else vlm2vec(words)
    told = capsys.readouterr()
    return code, told.out, told.err


def assert_refused(capsys, words, *named: str) -> None:
    """The command ends with exit code 2 and one line below 500 characters that holds every string of `named`."""
    code, out, error = call(capsys, *words)
    assert code == 2, f"exit code {code}: {out[-300:]} {error[-300:]}"
    assert "Traceback" not in error, error[-2000:]
    last = error.strip().splitlines()[-1]
    assert last.startswith(("vlm2vec ", "train: ")) and len(last) < MOST, f"{len(last)} characters: {last[:900]}"
    lacking = [name for name in named if name not in last]
    assert not lacking, f"{lacking} not named in: {last}"


def assert_runs(capsys, words) -> tuple[str, str]:
    """The command ends with exit code 0. Returns (standard output, standard error)."""
    code, out, error = call(capsys, *words)
    assert code == 0, f"exit code {code}: {error[-2000:]}"
    return out, error
