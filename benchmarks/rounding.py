"""What does the compact form cost in held-out loss when the trained entries are rounded?

    python rounding.py --data DATA

The case study's single-task LoRI-S adapters (interference.py: 160 rows, 20 steps, one seed) are trained with a rate
that was best there, and their held-out loss is measured as they are, and after `lori export --compact --dtype ...`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import report
from interference import Study

from lori_trl.compact import expand, export_compact
from lori_trl.evaluation import completion_loss

RATES = {"safety": 5e-3, "gsm8k": 5e-3}
DTYPES = {"exact": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


def measure(study: Study, task: str, folder: Path) -> dict[str, dict[str, float]]:
    """Return dtype -> bytes of the compact file, and the loss on the task's test rows."""
    study.train(folder / task, "LoRI-S", task, RATES[task], calibration_learning_rate=5e-4)
    figures = {}
    for name, dtype in DTYPES.items():
        file = export_compact(folder / task, folder / f"{task}-{name}.safetensors", dtype=dtype)
        expand(file, folder / f"{task}-{name}")
        loss = completion_loss(study.load(folder / f"{task}-{name}"), study.tokenizer, study.rows(task, "test"))
        figures[name] = {"bytes": file.stat().st_size, "loss": loss.loss, "stderr": loss.stderr}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with safety/ and gsm8k/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = Study(options.data, Path(folder))
        report("rounding", {task: measure(study, task, Path(folder)) for task in RATES})


if __name__ == "__main__":
    main()
