"""Layouts of transformers, timm, peft and Lightning: small networks, nothing downloaded.

Each is imported where it is built, so that the list can be read without these libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layouts import NOT_TRIED, Case, Layout
from torch import Tensor, nn

N, V, T = 8, 40, 7
LAYOUTS: list[Layout] = []
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SUM = {"per": "sample"}  # the sum over the tokens of a sample
DECODER = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False}


def layout(name: str, library: str, *, last: str | None = None, **more: Any) -> Callable:
    def add(build: Callable[[], Case]) -> Callable[[], Case]:
        more.setdefault("tolerance", 2e-5)  # most compute some of their layers in float32 always
        LAYOUTS.append(Layout(name, build, last, library=library, **more))
        return build

    return add


def sentences(padded: bool = True, left: bool = False) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, V, (N, T), generator=g)
    length = torch.randint(3, T + 1, (N, 1), generator=g) if padded else T
    mask = (torch.arange(T) < length).long()
    if not padded:
        mask = torch.ones(N, T, dtype=torch.long)
    ids = ids * mask
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]


def transformer(name: str, config: str, settings: dict[str, Any], scale: float = 5.0) -> nn.Module:
    import transformers

    torch.manual_seed(3)
    with torch.no_grad():
        model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
        for parameter in model.parameters():  # logits of some size
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model


def summed_loss(shift: bool) -> Callable[..., Tensor]:
    """Return the model's own loss, a mean over counted tokens, times their number."""

    def loss(model: nn.Module, x: dict[str, Tensor], y: Tensor) -> Tensor:
        counted = (y[:, 1:] if shift else y) != -100
        return model(**x, labels=y).loss * counted.sum()

    return loss


def causal(name: str, config: str, **settings: Any) -> Case:
    model = transformer(name, config, {**DECODER, **settings})
    data = [(x, torch.where(x["attention_mask"] > 0, x["input_ids"], -100)) for x in sentences()]
    return Case(model, data, loss=summed_loss(True), moved=False, options=SUM)


CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"tie_word_embeddings": False}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "Gemma2, final soft cap": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": 2.0},
    ),
    "Cohere, logit scale": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.0625}),
    "Granite, logits scaling": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 8.0}),
}
for _name, (_model, _config, _settings) in CAUSAL.items():
    layout(f"{_name}: next token", "transformers")(
        lambda m=_model, c=_config, s=_settings: causal(m, c, **s)
    )


def mean_loss(model: nn.Module, x: dict[str, Tensor], y: Tensor) -> Tensor:
    """Return the model's own loss, as it is: the mean over the counted tokens."""
    return model(**x, labels=y).loss


@layout("GPT-2: next token, the mean over tokens", "transformers")
def _mean_of_tokens() -> Case:
    case = causal(*CAUSAL["GPT-2"][:2], tie_word_embeddings=False)
    return Case(case.model, case.data, loss=mean_loss, moved=False)


TRANSLATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    ),
    "BART": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
            **{"d_model": 16, "bos_token_id": 1, "eos_token_id": 2},
        },
    ),
}


def translator(name: str, config: str, **settings: Any) -> Case:
    """An encoder and a decoder, whose inputs the model makes of the labels."""
    base = {"vocab_size": V, "pad_token_id": 0, "tie_word_embeddings": False}
    model = transformer(name, config, {**base, "decoder_start_token_id": 0, **settings})
    # T5 ties its head whatever is asked; what is compared is the gradient of the head's own use.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    y = torch.randint(3, V, (N, 5), generator=torch.Generator().manual_seed(5))
    y[::2, 3:] = -100
    return Case(model, list(zip(sentences(), y, strict=True)), loss=mean_loss, moved=False)


for _name, (_model, _config, _settings) in TRANSLATORS.items():
    layout(f"{_name}: encoder and decoder", "transformers", tolerance=1e-4)(
        lambda m=_model, c=_config, s=_settings: translator(m, c, **s)
    )


@layout("Lightning: a language model within a LightningModule", "lightning")
def _lightning() -> Case:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.net(input_ids=input_ids, attention_mask=attention_mask)

    def loss(model: nn.Module, x: dict[str, Tensor], y: Tensor) -> Tensor:
        return mean_loss(model.net, x, y)  # type: ignore[arg-type]

    inside = causal(*CAUSAL["Llama"][:2])
    return Case(Module(inside.model), inside.data, loss=loss, moved=False)


@layout("Lightning: a classifier", "lightning")
def _lightning_classifier() -> Case:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.backbone(x))

    torch.manual_seed(3)
    g = torch.Generator().manual_seed(6)
    x, y = torch.randn(N, 6, generator=g), torch.randint(3, (N,), generator=g)
    return Case(Module(), list(zip(x, y.tolist(), strict=True)))


def classifier(name: str, config: str, left: bool = False, **settings: Any) -> Case:
    base = DECODER if "num_key_value_heads" in settings else SMALL
    model = transformer(name, config, {**base, "num_labels": 3, **settings})
    labels = torch.randint(3, (N,), generator=torch.Generator().manual_seed(5)).tolist()

    def loss(model: nn.Module, x: dict[str, Tensor], y: Tensor) -> Tensor:
        return model(**x, labels=y).loss

    data = list(zip(sentences(left=left), labels, strict=True))
    return Case(model, data, loss=loss, moved=False)


CLASSIFIERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertForSequenceClassification", "BertConfig", {}),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", {"pad_token_id": 0}),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
    ),
    "GPT-2, last token": ("GPT2ForSequenceClassification", "GPT2Config", {}),
    "Llama, last token": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {"num_key_value_heads": 2},
    ),
    "Qwen2, last token, padded on the left": (
        "Qwen2ForSequenceClassification",
        "Qwen2Config",
        {"num_key_value_heads": 2, "left": True},
    ),
}
for _name, (_model, _config, _settings) in CLASSIFIERS.items():
    layout(f"{_name}: class of a sequence", "transformers")(
        lambda m=_model, c=_config, s=_settings: classifier(m, c, **s)
    )


@layout("BERT: class of every token", "transformers")
def _token_classes() -> Case:
    model = transformer("BertForTokenClassification", "BertConfig", {**SMALL, "num_labels": 3})
    y = torch.randint(3, (N, T), generator=torch.Generator().manual_seed(5))
    data = [
        (x, torch.where(x["attention_mask"] > 0, labels, -100))
        for x, labels in zip(sentences(), y, strict=True)
    ]
    return Case(model, data, loss=summed_loss(False), moved=False, options=SUM)


def masked(name: str, config: str, **settings: Any) -> Case:
    model = transformer(name, config, {**SMALL, "tie_word_embeddings": False, **settings})
    data = []
    for k, x in enumerate(sentences()):
        hidden = (torch.arange(T) + k) % 3 == 0
        labels = torch.where(hidden & (x["attention_mask"] > 0), x["input_ids"], -100)
        labels[0] = x["input_ids"][0] if x["attention_mask"][0] else -100
        data.append((x, labels))
    return Case(model, data, loss=summed_loss(False), moved=False, options=SUM)


layout("BERT: masked tokens", "transformers")(lambda: masked("BertForMaskedLM", "BertConfig"))
layout("RoBERTa: masked tokens", "transformers")(
    lambda: masked("RobertaForMaskedLM", "RobertaConfig", pad_token_id=0)
)


@layout("BERT: multiple choice", "transformers", last="made of several rows", full=NOT_TRIED)
def _multiple_choice() -> Case:
    model = transformer("BertForMultipleChoice", "BertConfig", SMALL)
    items = sentences(padded=False)
    data = []
    for k in range(N):
        both = [items[k], items[(k + 1) % N]]
        data.append(({n: torch.stack([one[n] for one in both]) for n in both[0]}, k % 2))
    return Case(model, data, moved=False)


@layout(
    "BERT: span of an answer",
    "transformers",
    last="the model's logits are not the output of head",
    full=NOT_TRIED,
)
def _span() -> Case:
    model = transformer("BertForQuestionAnswering", "BertConfig", SMALL)
    return Case(model, [(x, 1) for x in sentences()], moved=False)


@layout("ViT of transformers", "transformers")
def _vit() -> Case:
    settings = {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 3}
    model = transformer("ViTForImageClassification", "ViTConfig", settings)
    return images(model, 8, 3, read=lambda outputs: outputs.logits)


def images(
    model: nn.Module, side: int, classes: int, read: Callable[[Any], Tensor] = lambda o: o
) -> Case:
    g = torch.Generator().manual_seed(6)
    x, y = torch.randn(N, 3, side, side, generator=g), torch.randint(classes, (N,), generator=g)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(read(model(x)), y)

    return Case(model, list(zip(x, y.tolist(), strict=True)), loss=loss, moved=False)


def timm_model(name: str, side: int = 32, **settings: Any) -> Case:
    import timm

    torch.manual_seed(3)
    model = timm.create_model(name, pretrained=False, num_classes=5, **settings).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.std() == 0 and parameter.mean() == 0:
            parameter.data.normal_(std=0.1)  # heads and offsets that start at zero
    return images(model, side, 5)


SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("resnet10t", {}),
    "ResNetV2, a 1 x 1 convolution as head": ("resnetv2_18", {}),
    "ViT, class token": ("vit_tiny_patch16_224", SMALL_VIT),
    "ViT, mean of tokens": ("vit_tiny_patch16_224", {**SMALL_VIT, "global_pool": "avg"}),
    "BEiT": ("beit_base_patch16_224", SMALL_VIT),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)},
    ),
    "MLP-Mixer": ("mixer_s32_224", {"img_size": 32}),
    "MobileNetV3": ("mobilenetv3_small_050", {}),
    "EfficientNet": ("efficientnet_lite0", {}),
}
for _name, (_model, _settings) in TIMM.items():
    layout(f"timm: {_name}", "timm", full=NOT_TRIED, tolerance=1e-4)(
        lambda m=_model, s=_settings: timm_model(m, **s)
    )


@layout("timm: distilled DeiT", "timm", last="gives 2 modules", full=NOT_TRIED)
def _deit() -> Case:
    return timm_model("deit_tiny_distilled_patch16_224", **SMALL_VIT)


@layout("timm: distilled DeiT, one head chosen", "timm", last="is added to it", full=NOT_TRIED)
def _deit_head() -> Case:
    found = timm_model("deit_tiny_distilled_patch16_224", **SMALL_VIT)
    found.options["head"] = "head"
    return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.body(x)))


def adapted(targets: list[str], merged: bool = False, **settings: Any) -> Case:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=targets, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    if merged:
        model.merge_adapter()
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(N, 6, generator=g), torch.randint(4, (N,), generator=g).tolist()
    return Case(model.eval(), list(zip(x, y, strict=True)), moved=False)


layout("peft: LoRA on the body", "peft")(lambda: adapted(["body"]))
layout("peft: LoRA on the body, head in modules_to_save", "peft")(
    lambda: adapted(["body"], modules_to_save=["fc"])
)
layout("peft: LoRA on the head", "peft", last="has an adapter (peft's Linear)")(
    lambda: adapted(["body", "fc"])
)
layout("peft: LoRA merged into the head", "peft", full=NOT_TRIED)(
    lambda: adapted(["body", "fc"], merged=True)
)


@layout("peft: LoRA of a causal language model", "peft", full=NOT_TRIED)
def _causal_lora() -> Case:
    from peft import LoraConfig, get_peft_model

    found = causal("LlamaForCausalLM", "LlamaConfig")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    found.model = get_peft_model(found.model, config).eval()
    found.options = {**SUM, "shift_labels": True}
    return found
