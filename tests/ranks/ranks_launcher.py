"""A launcher as torchrun is one: starts N copies of a program, each with its place in the environment, and waits.

The program of the test trains in one process, so that only the first copy is given the folder to write to.
"""

import os
import subprocess
import sys
from pathlib import Path

ranks, program = int(sys.argv[1]), sys.argv[2:]
out = program[program.index("--out") + 1]
running = []
for rank in range(ranks):
    mine = list(program)
    if rank:
        mine[mine.index("--out") + 1] = f"{out}-{rank}"
        Path(f"{out}-{rank}").mkdir(exist_ok=True)
    place = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    running.append(subprocess.Popen([sys.executable, *mine], env=os.environ | place))
    Path(out, f"arguments{rank}").write_text("\n".join(mine))
sys.exit(max(process.wait() for process in running))
