"""The label shift of networks of transformers and peft: what their own losses say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moso_fast.scoring.head.shift import LabelShift

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.models

VOCABULARY = 61
_BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
# Class, configuration and its sizes, whether logits at t are of the label at t + 1.
NETWORKS = [
    ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2}, True),
    ("LlamaForCausalLM", "LlamaConfig", _LLAMA, True),
    ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA, True),
    ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "head_dim": 8}, True),
    (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA, "num_local_experts": 2, "output_router_logits": True},
        True,
    ),
    ("BertLMHeadModel", "BertConfig", {**_BERT, "is_decoder": True}, True),
    (
        "ElectraForCausalLM",
        "ElectraConfig",
        {**_BERT, "embedding_size": 16, "is_decoder": True},
        True,
    ),
    ("BertForMaskedLM", "BertConfig", _BERT, False),
    ("BertForTokenClassification", "BertConfig", {**_BERT, "num_labels": VOCABULARY}, False),
    ("BartForConditionalGeneration", "BartConfig", _BART, False),
    ("BartForCausalLM", "BartConfig", _BART, False),
    (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
        False,
    ),
    (
        "XLMWithLMHeadModel",
        "XLMConfig",
        {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 1},
        False,
    ),
    (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        False,
    ),
]


def network(name: str, config: str, sizes: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=VOCABULARY, **sizes)
    return getattr(transformers, name)(made).eval()


def decided(model: torch.nn.Module, labels_are_tokens: bool) -> LabelShift:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=generator)
    labels = ids if labels_are_tokens else torch.randint(3, VOCABULARY, (4, 9), generator=generator)
    labels = labels.clone()
    labels[:, 7:] = -100
    shift = LabelShift(model, "auto")
    with torch.no_grad():
        shift.decide((), {"input_ids": ids}, labels)
    return shift


@pytest.mark.parametrize("same", [True, False], ids=["tokens", "others"])
@pytest.mark.parametrize("name, config, sizes, expected", NETWORKS, ids=[n[0] for n in NETWORKS])
def test_networks_of_transformers(name, config, sizes, expected, same) -> None:
    shift = decided(network(name, config, sizes), same)
    assert shift.value is expected and "own loss" in shift.reason


def test_an_adapter_without_a_task_type() -> None:
    peft = pytest.importorskip("peft")
    model = network(*NETWORKS[0][:3])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"])).eval()
    assert decided(adapted, False).value is True
