"""Every program sets OpenMP's threads to wait without spinning before torch is imported, unless its user has chosen."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.repository import ROOT

# Ends the process where torch is first imported, and prints what the environment says then.
WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("at torch:", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
from {module} import main
main({words!r})
"""
PROGRAMS = {
    "vlm2vec info": ("vlm2vec.cli", ["info", "no-such-folder"]),
    "vlm2vec train": ("vlm2vec.cli", ["train", "quickstart"]),
    "python -m train": ("train.__main__", ["quickstart"]),
    "python -m train plan": ("train.__main__", ["plan", "quickstart"]),
    "python -m vlm2vec.quickstart": ("vlm2vec.quickstart.__main__", ["build", "folder"]),
    "python -m bench": ("bench.__main__", ["loss"]),
}


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_before_torch_is_imported(program, chosen, tmp_path):
    module, words = PROGRAMS[program]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    code = WATCH.format(module=module, words=words)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith(f"at torch: {chosen or 'PASSIVE'}"), done.stdout + done.stderr


@pytest.mark.parametrize("chosen", ["PASSIVE", "ACTIVE"])
def test_the_makefile_hands_it_on(chosen):
    """`make` sets it where the user has not."""
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^export OMP_WAIT_POLICY \?= PASSIVE$", text, re.M)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if chosen == "PASSIVE" else {"OMP_WAIT_POLICY": chosen}
    shown = "include Makefile\nshown:\n\t@echo $$OMP_WAIT_POLICY\n"
    done = subprocess.run(["make", "-s", "-f", "-", "shown"], input=shown, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == chosen, done.stderr
