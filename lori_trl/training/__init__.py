"""Training: the phases of a run, its settings, what is refused before it, and what it says of itself."""

from ..inputs.stack import check_stack

check_stack()  # before TRL and PEFT are imported: where they are too old, names that are imported are missing
