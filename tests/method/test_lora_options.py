"""Every field of PEFT's LoraConfig is known: trained as PEFT means it, or refused before the first step."""

import copy
import dataclasses

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import config as configs
from tiny import lora_config

from lori_trl.method import lora_options
from lori_trl.method.lora_options import BEGINNINGS, DENSE, REFUSED, SUPPORTED, check_lora_config

FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}  # `kasa_config` is PEFT 0.21's
# A value that asks for it, for each of the refused fields.
ASKED = {
    "use_dora": True,
    "lora_bias": True,
    "target_parameters": ["q_proj.weight"],
    "alora_invocation_tokens": [3, 4],
    "use_qalora": True,
    "use_bdlora": configs.BdLoraConfig(target_modules_bd_a=["q_proj"]),
    "arrow_config": configs.ArrowConfig(),
    "kasa_config": getattr(configs, "KasaConfig", object)(),
    "monteclora_config": configs.MontecloraConfig(),
    "velora_config": configs.VeloraConfig(),
    "megatron_config": {"tensor_model_parallel_size": 1},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": configs.EvaConfig(),
    "corda_config": configs.CordaConfig(),
    "lora_ga_config": configs.LoraGAConfig(),
}


def test_every_field_of_a_lora_config_stands_in_the_table_once():
    """PEFT's next field fails here: say whether it is supported, or refused and why."""
    table = [*SUPPORTED, *DENSE, *REFUSED, *BEGINNINGS]
    assert FIELDS <= set(table) and len(table) == len(set(table))
    assert set(table) - FIELDS <= {"kasa_config"}


def test_a_field_that_only_a_later_peft_has_is_refused_where_it_is_set(make_trainer, monkeypatch):
    monkeypatch.setattr(lora_options, "_KNOWN", FIELDS - {"qalora_group_size"})
    config = lora_config(qalora_group_size=8)
    with pytest.raises(ValueError, match="`qalora_group_size=8` is not possible with LoRI: this PEFT is newer than"):
        make_trainer(model="no/such-model", peft_config=config)
    check_lora_config(lora_config(), fresh=True)


def test_every_variant_of_peft_is_refused():
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants and variants <= REFUSED.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(FIELDS & {*REFUSED, *BEGINNINGS}))
def test_what_is_no_plain_lora_is_refused_before_a_model_is_loaded(make_trainer, name):
    config = lora_config()
    setattr(config, name, ASKED[name])  # some need each other when they are passed
    with pytest.raises(ValueError, match=rf"`{name}=.*` is not possible with LoRI: .*Allowed is .*Change it in"):
        make_trainer(model="no/such-model", peft_config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, r"`bias='all'` is not possible.*Allowed is 'none'"),
        ({"init_lora_weights": "pissa"}, r"`init_lora_weights='pissa'` is not possible"),
        ({"init_lora_weights": "mica"}, r"`init_lora_weights='mica'` is not possible"),
        ({"init_lora_weights": False}, r"`init_lora_weights=False` is not possible"),
        ({"lora_alpha": 0}, r"`lora_alpha=0` is outside \(0, inf\)"),
        ({"lora_dropout": 1.0}, r"`lora_dropout=1.0` is outside \[0, 1\)"),
        ({"alpha_pattern": {"q_proj": -1}}, r"`alpha_pattern\['q_proj'\]=-1` is outside \(0, inf\)"),
    ],
)
def test_other_values_that_lori_is_not_defined_for(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model="no/such-model", peft_config=lora_config(**changes))


def test_other_modules_than_linear_layers_are_refused(make_trainer):
    with pytest.raises(ValueError, match="not linear layers: model.embed_tokens"):
        make_trainer(peft_config=lora_config(target_modules=["q_proj", "embed_tokens"]))


def test_other_kinds_of_adapters_are_refused(make_trainer):
    with pytest.raises(TypeError, match="IA3Config. LoRI is a kind of LoRA"):
        make_trainer(peft_config=IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


@pytest.mark.parametrize(
    "changes",
    [{"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, {"target_parameters": ["q_proj.weight"]}],
)
def test_an_adapter_that_is_there_is_refused_too(make_trainer, llama, changes):
    model = get_peft_model(copy.deepcopy(llama), lora_config(target_modules=["v_proj"], **changes))
    with pytest.raises(ValueError, match="is not possible with LoRI"):
        make_trainer(model=model)


def test_a_layer_that_computes_something_else_is_refused(make_trainer, llama):
    """Whoever asked for it: the packed backend would take its place."""
    model = get_peft_model(copy.deepcopy(llama), lora_config(alora_invocation_tokens=[3], task_type="CAUSAL_LM"))
    model.peft_config["default"].alora_invocation_tokens = None
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj` computes ALoraLinearVariant in place of LoRA"):
        make_trainer(model=model)


def test_an_adapter_that_began_with_pissa_can_be_continued(make_trainer, llama):
    model = get_peft_model(copy.deepcopy(llama), lora_config(init_lora_weights="pissa"))
    trainer = make_trainer(model=model, max_steps=1, calibration_max_steps=1)
    trainer.train()
    for path, weight in trainer.weights.items():
        assert torch.equal(weight[~trainer.masks[path]], trainer.run.initial_weights[path][~trainer.masks[path]])
