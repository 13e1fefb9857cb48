"""A laboratory of seconds: a transformer of 70,000 parameters on strings, to screen ideas about A with a dozen seeds.

    python benchmarks/laboratory.py [--seeds 12] [--arms "LoRI-D" "contrastive D"]

Pretrained on four things to do with a string, it learns a fifth (its letters backwards), then a sixth (each letter's
successor). What of the fifth is lost is read where the sixth's loss is 1 nat a token, for every arm at the rate whose
loss on the sixth ends lowest. It decides nothing about the paper: `benchmarks/forgetting` does, on a language model.
"""

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from claims.evidence import estimate
from common import report
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lori_trl.method.contrastive import contrastive_projections
from lori_trl.method.layers import lora_layers
from lori_trl.method.projections import init_projections
from lori_trl.method.selection import select_largest
from lori_trl.method.sparsity import num_to_select

LETTERS, LENGTH = 16, 8  # letters are tokens 0 to 15
DO, GIVES = LETTERS, LETTERS + 8  # eight words for what to do; the sign before the answer
PRETRAINING_STEPS, FIRST_STEPS, STEPS, BATCH = 1200, 80, 80, 24
RANK, SPARSITY, POINTS, LEVEL = 8, 0.9, range(0, STEPS + 1, 10), 1.0
PROTECTED, HELD_OUT, EPSILON = 64, 64, 0.1
REPLAYED = 2  # rows of a batch

Rows = Tensor  # (rows, tokens)
TASKS: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": lambda letters: letters,
    "sort": sorted,
    "double": lambda letters: [letter for letter in letters[: LENGTH // 2] for _ in range(2)],
    "rotate": lambda letters: letters[1:] + letters[:1],
    "backwards": lambda letters: letters[::-1],
    "successor": lambda letters: [(letter + 1) % LETTERS for letter in letters],
}
FIRST, SECOND = "backwards", "successor"
DENSE_RATES, SPARSE_RATES = (1e-2, 3e-2), (3e-2, 1e-1)
# Arm -> how A is made, whether A is trained, whether B is sparse, whether the batch has rows of the first task.
ARMS: dict[str, tuple[str, bool, bool, bool]] = {
    "LoRA": ("random", True, False, False),
    "LoRA, replay": ("random", True, False, True),
    "LoRI-D": ("random", False, False, False),
    "LoRI-S": ("random", False, True, False),
    "nothing protected D": ("unprotected", False, False, False),
    "contrastive D": ("contrastive", False, False, False),
    "contrastive S": ("contrastive", False, True, False),
}


def rows_of(task: str, count: int, chance: random.Random) -> Rows:
    """Draw rows of a task: what to do, the string, the sign, the answer."""
    word = DO + list(TASKS).index(task)
    strings = [[chance.randrange(LETTERS) for _ in range(LENGTH)] for _ in range(count)]
    return torch.tensor([[word, *letters, GIVES, *TASKS[task](letters)] for letters in strings])


def loss_of(model: torch.nn.Module, rows: Rows) -> Tensor:
    """Return the loss on the answers, in nats a token."""
    logits = model(input_ids=rows).logits[:, LENGTH + 1 : -1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, LENGTH + 2 :].flatten())


def pretrained() -> LlamaForCausalLM:
    """Pretrain the model on the first four tasks: the same for all seeds."""
    torch.manual_seed(0)
    chance = random.Random(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=56, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=PRETRAINING_STEPS)
    for _ in track(range(PRETRAINING_STEPS), "pretraining"):
        batch = torch.cat([rows_of(task, 16, chance) for task in list(TASKS)[:4]])
        loss_of(model, batch).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


class Seed:
    """
    What all arms of a seed have in common: the model with the first task in its weights, and the rows.

    Args:
        base (`LlamaForCausalLM`): the pretrained model.
        number (`int`): draws the rows.
    """

    def __init__(self, base: LlamaForCausalLM, number: int):
        self.number = number
        chance = random.Random(f"first/{number}")
        self.protected = rows_of(FIRST, PROTECTED, chance)
        self.held_out = {task: rows_of(task, HELD_OUT, random.Random(f"{task}/test")) for task in (FIRST, SECOND)}
        model = self._adapter(copy.deepcopy(base))
        batches = [rows_of(FIRST, BATCH, chance) for _ in range(FIRST_STEPS)]
        _train(model, [weight for name, weight in model.named_parameters() if "lora_" in name], 1e-2, batches)
        self.start = model.merge_and_unload()
        chance = random.Random(f"second/{number}")
        self.rows = rows_of(SECOND, PROTECTED, chance)
        self.batches = [rows_of(SECOND, BATCH, chance) for _ in range(STEPS)]

    def _adapter(self, model: LlamaForCausalLM) -> PeftModel:
        torch.manual_seed(self.number)
        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))

    def curve(self, arm: str, rate: float, dense_rate: float | None) -> list[tuple[float, float]]:
        """
        Train an arm on the second task.

        Args:
            dense_rate (`float`, *optional*): of the dense run that a sparse arm's mask is taken from.

        Returns:
            `list[tuple[float, float]]`: the losses on the second and on the first task, at every one of `POINTS`.
        """
        A, trained_A, sparse, replay = ARMS[arm]
        model = self._adapter(copy.deepcopy(self.start))
        if not trained_A:
            self._set_A(model, A)
        B = {name: weight for name, weight in model.named_parameters() if ".lora_B." in name}
        if sparse:
            _train(model, list(B.values()), dense_rate, self.batches)
            masks, _ = select_largest({name: weight.abs() for name, weight in B.items()}, _selected(B))
            with torch.no_grad():
                for name, weight in B.items():
                    weight.zero_()
                    weight.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
        trained = [w for name, w in model.named_parameters() if ".lora_A." in name] if trained_A else []
        batches = [self._with_replay(batch, step) if replay else batch for step, batch in enumerate(self.batches)]
        return list(_train(model, [*B.values(), *trained], rate, batches, self.held_out))

    def _with_replay(self, batch: Rows, step: int) -> Rows:
        again = torch.arange(step * REPLAYED, (step + 1) * REPLAYED) % PROTECTED
        return torch.cat([batch[REPLAYED:], self.protected[again]])

    def _set_A(self, model: PeftModel, kind: str) -> None:
        init_projections(model, "default", seed=self.number)
        if kind == "random":
            return
        protected = self.protected.tolist() if kind == "contrastive" else ()
        made = contrastive_projections(model, "default", rows=self.rows.tolist(), protected=protected, epsilon=EPSILON)
        for path, layer in lora_layers(model, "default").items():
            layer.lora_A["default"].weight.data.copy_(made[path])


def _selected(B: dict[str, Tensor]) -> int:
    return num_to_select(SPARSITY, sum(weight.numel() for weight in B.values()))


def _train(
    model: torch.nn.Module,
    parameters: Sequence[Tensor],
    rate: float | None,
    batches: Sequence[Rows],
    held_out: dict[str, Rows] | None = None,
) -> list[tuple[float, float]]:
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    curve = []
    for step in range(len(batches) + 1):
        if held_out is not None and step in POINTS:
            with torch.no_grad():
                curve.append((loss_of(model, held_out[SECOND]).item(), loss_of(model, held_out[FIRST]).item()))
        if step < len(batches):
            loss_of(model, batches[step]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return curve


def lost_at_level(curve: list[tuple[float, float]]) -> float | None:
    """Return how far the first task's loss has risen where the second's first reaches `LEVEL`, if it does."""
    for (here, lost), (there, later) in zip(curve, curve[1:], strict=False):
        if there <= LEVEL:
            return lost + (here - LEVEL) / (here - there) * (later - lost) - curve[0][1]
    return None


def runs(seeds: Sequence[Seed], arms: Sequence[str]) -> Iterator[tuple[str, float, list]]:
    """Run every arm at all its rates. A sparse arm's masks come from the best rate of its dense one."""
    best: dict[tuple, float] = {}
    for arm in sorted(arms, key=lambda arm: ARMS[arm][2]):
        A, trained_A, sparse, _ = ARMS[arm]
        for rate in SPARSE_RATES if sparse else DENSE_RATES:
            dense_rate = best.get((A, trained_A), DENSE_RATES[0])
            curves = [seed.curve(arm, rate, dense_rate) for seed in track(seeds, f"{arm}, {rate:g}")]
            yield arm, rate, curves
            ends = statistics.fmean(curve[-1][0] for curve in curves)
            if not sparse and ends < best.get((A, trained_A, "loss"), float("inf")):
                best[A, trained_A], best[A, trained_A, "loss"] = rate, ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = pretrained()
    seeds = [Seed(base, number) for number in track(range(options.seeds), "first task")]
    found: dict[str, list[tuple[float, float, list]]] = {}
    for arm, rate, curves in runs(seeds, options.arms):
        found.setdefault(arm, []).append((statistics.fmean(curve[-1][0] for curve in curves), rate, curves))
    table = Table("arm", "rate", "second task at the end", "first: lost at 1 nat of the second", "lost at the end")
    results = {}
    for arm, tried in found.items():
        end, rate, curves = min(tried, key=lambda each: each[0])
        lost = [value for curve in curves if (value := lost_at_level(curve)) is not None]
        at_end = [curve[-1][1] - curve[0][1] for curve in curves]
        at_level = estimate(lost, len(curves))
        table.add_row(arm, f"{rate:g}", f"{end:.3f}", at_level.text(2), estimate(at_end, len(curves)).text(2))
        results[arm] = {"rate": rate, "second at the end": round(end, 4), "lost at level": [round(x, 4) for x in lost],
                        "lost at the end": [round(x, 4) for x in at_end]}  # fmt: skip
    Console().print(table)
    parameters = sum(weight.numel() for weight in base.parameters())
    first = [seed_loss(seed) for seed in seeds]
    scope = "It screens ideas, and decides nothing about the paper."
    report("laboratory", {"scope": scope, "parameters": parameters, "first task before": first, "arms": results})


def seed_loss(seed: Seed) -> float:
    """Return the loss on the first task before the second."""
    with torch.no_grad():
        return round(loss_of(seed.start, seed.held_out[FIRST]).item(), 4)


if __name__ == "__main__":
    main()
