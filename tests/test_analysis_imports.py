"""The analysis side runs where torch can't be imported: all of it, whatever it imports on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import importlib, pkgutil, sys

FORBIDDEN = {"torch", "lightning", "deepspeed", "fairscale", "moe", "baselines", "methods", "experiments"}

class Forbids:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"{name} was imported")

sys.meta_path.insert(0, Forbids())
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the hook does not work")
import analysis
for module in pkgutil.walk_packages(analysis.__path__, "analysis."):
    importlib.import_module(module.name)
from analysis.claims import main
raise SystemExit(main(["--json"]))
"""


def test_no_module_needs_torch_or_another_room() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout)) > 30
