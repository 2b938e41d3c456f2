"""Modules are imported from the repository root, wherever pytest is started.

One thread, unless OMP_NUM_THREADS says more: the models of the tests are too small to gain much
from a second one, and on a machine that is busy beside, two that wait for each other took up to
15 times the CPU seconds of one."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before anything imports torch; programs too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
