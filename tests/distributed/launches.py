"""How two ranks are started on the CPU: with the launch files that are shipped, and another precision."""

import os
import subprocess
from pathlib import Path

from lori_trl.training.parallel_engines import find_launch_file

HERE = Path(__file__).parent
SECONDS = 600  # a launch takes up to a minute and a half on two quiet cores
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def run(command: list) -> subprocess.CompletedProcess:
    """Run a command to its end. One that hangs is told to end, so that it ends its ranks too."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes) as process:
        try:
            output = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            output = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *output)


def launch(engine: str, script: str, *arguments) -> subprocess.CompletedProcess:
    """Start a script of this folder on two ranks."""
    options = ["--config_file", find_launch_file(engine), "--num_processes", "2", "--mixed_precision", "no"]
    return run(["accelerate", "launch", *options, HERE / script, *arguments])
