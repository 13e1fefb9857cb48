"""GRPO and RLOO with vLLM's rollouts: what is sent to the server, and what stays as it was."""

import copy

import pytest
import torch
from tiny import lora_config, make_tokenizer, needs
from trl.generation import vllm_generation

from lori_trl import LoriGRPOConfig, LoriGRPOTrainer, LoriRLOOConfig, LoriRLOOTrainer
from lori_trl.method.sharding import assign

PAIRS = {"GRPO": (LoriGRPOConfig, LoriGRPOTrainer), "RLOO": (LoriRLOOConfig, LoriRLOOTrainer)}


class Server:
    """Stands in for the client of a server: keeps what it is sent, and answers with words that differ."""

    sent: list = []
    made: list = []

    def __init__(self, **named):
        Server.sent, Server.made = [], [self]

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, parameters):
        tensors = {name: tensor.clone() for name, tensor in parameters}
        assert [name for name, *_ in metadata] == list(tensors)
        Server.sent.append(tensors)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, features, n, **named):
        answers = [[3 + (7 * number + 5 * place) % 90 for place in range(3)] for number in range(n * len(prompts))]
        logprobs = [[[-1.0] for _ in answer] for answer in answers]
        return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": logprobs}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Server, raising=False)
    Server.sent, Server.made = [], []
    return Server


def make(name, model, folder, rows, **changes):
    config_class, trainer_class = PAIRS[name]
    defaults = {
        "task_name": "task",
        "use_vllm": True,
        "vllm_mode": "server",
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 5e-1,
        "calibration_learning_rate": 5e-1,
        "max_steps": 3,
        "calibration_max_steps": 1,
        "per_device_train_batch_size": 4,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return trainer_class(
        model,
        args=config_class(str(folder), **defaults | changes),
        train_dataset=rows.select_columns("prompt"),
        processing_class=make_tokenizer(),
        peft_config=lora_config(),
        reward_funcs=lambda completions, **kwargs: [float(sum(map(ord, text)) % 11) for text in completions],
    )


@needs("trl", "1.16", "earlier ones send parameter by parameter, which the stand-in does not take")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_the_server_gets_names_that_it_knows_and_the_base_stays(llama, rows, tmp_path, server, name, dtype):
    base = copy.deepcopy(llama).to(dtype)
    trainer = make(name, copy.deepcopy(base), tmp_path, rows)
    assert trainer.args.sparse_backend == "hook"
    trainer.train()
    known = dict(base.named_parameters())
    assert len(server.sent) == 4  # before each step of both phases
    assert all(set(sent) == set(known) for sent in server.sent)
    first_of_each_phase = server.sent[0], server.sent[1]
    for sent in first_of_each_phase:  # B is zero
        assert all(torch.equal(sent[name], weight) for name, weight in known.items())
    assert any(not torch.equal(server.sent[-1][name], weight) for name, weight in known.items())
    trained = {
        name.replace(".base_layer", ""): weight for name, weight in trainer.model.get_base_model().named_parameters()
    }
    assert all(torch.equal(trained[name], weight) for name, weight in known.items())


@needs("trl", "1.16", "earlier ones send parameter by parameter, which the stand-in does not take")
def test_a_base_that_is_changed_all_the_same_is_told(llama, rows, tmp_path, server):
    trainer = make("GRPO", copy.deepcopy(llama), tmp_path, rows, sparsity=0.0)
    weight = next(iter(trainer.lora_layers.values())).get_base_layer().weight

    def change_base(*_, **__):
        assign(weight, weight + 1e-6)
        return [1.0, 2.0, 3.0, 4.0]

    trainer.reward_funcs = [change_base]
    trainer.reward_func_names = ["change_base"]
    with pytest.raises(RuntimeError, match="is not what it was when the run began"):
        trainer.train()


@needs("trl", "1.16", "earlier ones send parameter by parameter, which the stand-in does not take")
@pytest.mark.parametrize("name", PAIRS)
def test_packed_values_are_refused_before_the_calibration(llama, rows, tmp_path, server, name):
    with pytest.raises(ValueError, match="vLLM is sent the model's parameters by name"):
        make(name, copy.deepcopy(llama), tmp_path, rows, sparse_backend="packed")
    assert not server.sent
