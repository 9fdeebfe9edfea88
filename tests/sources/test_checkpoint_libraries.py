"""Checkpoints of transformers, peft and Lightning, whose names only the library itself knows."""

from __future__ import annotations

import copy
import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_reading import into
from torch import Tensor, nn

from moso_fast.sources.checkpoints.checkpoint import Checkpoint, read
from moso_fast.sources.checkpoints.fit import Fitted

transformers: Any = None
pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    """Import it only where these tests run, so that none is skipped where they do not."""
    global transformers
    transformers = pytest.importorskip("transformers")


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}
TEXT = {"vocab_size": 32, **SMALL, **HEADS}


def bert(seed: int = 0, **how: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(**TEXT, max_position_embeddings=16, num_labels=3, **how)
    return transformers.BertForSequenceClassification(config)


def mixtral() -> tuple[Any, type]:
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=4)
    return config, transformers.MixtralForCausalLM


def llava() -> tuple[Any, type]:
    vision = {**SMALL, **HEADS, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**vision),
    )
    return config, transformers.LlavaForConditionalGeneration


def gpt2() -> tuple[Any, type]:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return config, transformers.GPT2LMHeadModel


def t5() -> tuple[Any, type]:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2)
    return config, transformers.T5ForConditionalGeneration


def assert_same(fitted: Fitted, expected: dict[str, Tensor], prefix: str = "") -> None:
    assert fitted.tensors
    for name, tensor in fitted.tensors.items():
        assert torch.equal(tensor, expected[name.removeprefix(prefix)]), name


@pytest.mark.parametrize("make", [mixtral, llava, gpt2, t5])
@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_under_other_names_is_the_model_that_was_saved(
    tmp_path: Path, make: Any, shards: bool
) -> None:
    config, kind = make()
    torch.manual_seed(1)
    model, source = kind(config), kind(config)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    source.save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if shards else {}))
    assert_same(into(model, tmp_path), source.state_dict())
    torch.save({"model": source.state_dict()}, tmp_path / "x.pt")
    assert_same(into(model, tmp_path / "x.pt"), source.state_dict())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_names_of_old_files_are_turned_by_the_library(tmp_path: Path) -> None:
    source = bert(1)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in source.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(old, tmp_path / "pytorch_model.bin")
    fitted = into(bert(), tmp_path)
    assert fitted.entry == "names converted by transformers"
    assert_same(fitted, source.state_dict())


def test_a_folder_of_another_model_is_refused_with_its_names(tmp_path: Path) -> None:
    config, kind = gpt2()
    kind(config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit the model: 41 missing") as caught:
        into(bert(), tmp_path / "a")
    assert "\n" not in str(caught.value)
    bert(hidden_act="relu").save_pretrained(tmp_path / "b")
    wide = transformers.BertForSequenceClassification(
        transformers.BertConfig(**TEXT, max_position_embeddings=16, num_labels=5)
    )
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(3, 16\), in the model"):
        into(wide, tmp_path / "b")


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def lora(model: Any, **how: Any) -> Any:
    peft = pytest.importorskip("peft")
    how = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **how}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**how))


def test_an_adapter_folder_goes_onto_the_base_that_is_given(tmp_path: Path) -> None:
    base = bert()
    model, source = lora(base), lora(base)
    for parameter in source.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    source.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        fitted = into(model, place)
        assert_same(fitted, source.state_dict())
        assert fitted.entry == "adapter; base weights as given"
    assert_same(into(Wrapped(model), tmp_path), source.state_dict(), "net.")
    torch.save(source.state_dict(), tmp_path / "whole.pt")
    assert_same(into(model, tmp_path / "whole.pt"), source.state_dict())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"lora_alpha": 64}, "lora_alpha of the adapter is 8 there and 64 in the model"),
        ({"use_rslora": True}, "use_rslora of the adapter is False there and True in the model"),
        ({"r": 4}, "r of the adapter is 2 there and 4 in the model"),
        ({"target_modules": ["query"]}, "4 unexpected .*value.lora_A.weight"),
        ({"target_modules": ["query", "key", "value"]}, "4 missing or of another shape .*key.lora"),
    ],
)
def test_another_adapter_is_refused(tmp_path: Path, how: dict, message: str) -> None:
    lora(bert()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        into(lora(bert(), **how), tmp_path)


def test_an_adapter_without_an_adapted_model_says_how_to_get_one(tmp_path: Path) -> None:
    lora(bert()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"peft\.PeftModel\.from_pretrained\(base_model, folder\)"):
        into(bert(), tmp_path)


def trained(folder: Path, model: Any, **how: Any) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    data = [
        {"input_ids": torch.randint(0, 32, (7,)), "labels": torch.tensor(k % 3)} for k in range(8)
    ]
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=4,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **how,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()


def rate(folder: Path, step: int) -> float | None:
    return read(Checkpoint(folder / f"checkpoint-{step}")).stated.rate(None)


@pytest.mark.parametrize(
    "how",
    [
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    ],
)
def test_a_rate_that_was_not_logged_is_that_of_the_schedule(tmp_path: Path, how: dict) -> None:
    """Logged at every step, a folder says outright what the other one leaves to its schedule."""
    trained(tmp_path / "a", bert(), logging_steps=1, **how)
    trained(tmp_path / "b", bert(), logging_steps=500, **how)
    trained(tmp_path / "c", bert(), logging_steps=3, **how)
    for step in (2, 4, 6, 8):
        expected = rate(tmp_path / "a", step)
        assert expected
        assert rate(tmp_path / "b", step) == pytest.approx(expected, rel=1e-6)
        assert rate(tmp_path / "c", step) == pytest.approx(expected, rel=1e-6)


def test_a_schedule_that_is_not_the_one_of_the_settings_is_not_used(tmp_path: Path) -> None:
    trained(tmp_path, bert(), logging_steps=500)
    place = tmp_path / "checkpoint-4" / "scheduler.pt"
    state = torch.load(place)
    torch.save({**state, "_last_lr": [1e-5, 1e-5]}, place)
    stated = read(Checkpoint(tmp_path / "checkpoint-4")).stated
    assert stated.rate(None) is None
    assert stated.later is not None and stated.later.rate(None) == pytest.approx(2.5e-5)


def test_a_trainer_folder_of_an_adapter(tmp_path: Path) -> None:
    model = lora(bert())
    trained(tmp_path, model, logging_steps=1)
    assert_same(into(lora(bert()), tmp_path / "checkpoint-8"), model.state_dict())
    assert rate(tmp_path, 8) == pytest.approx(5e-5 / 8)


def test_a_lightning_file_with_paths_among_its_settings(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, width: int = 8, out: Any = pathlib.Path("x")) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    lit = Lit()
    data = torch.utils.data.TensorDataset(torch.randn(8, 5), torch.arange(8) % 3)
    trainer = lightning.Trainer(
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(lit, torch.utils.data.DataLoader(data, batch_size=4))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert read(Checkpoint(tmp_path / "x.ckpt")).lr == pytest.approx(0.05)
    assert_same(into(Lit(), tmp_path / "x.ckpt"), lit.state_dict())
    fitted = into(Lit().net, tmp_path / "x.ckpt")
    assert_same(fitted, lit.net.state_dict())
    assert fitted.entry == "state_dict.net." and fitted.notes == ()


@pytest.mark.parametrize(
    ("spoil", "mend", "message"),
    [
        ("merge_adapter", "unmerge_adapter", r"is merged .*call unmerge_adapter\(\)"),
        ("disable_adapter_layers", "enable_adapter_layers", r"disabled.*enable_adapter_layers\(\)"),
    ],
)
@pytest.mark.parametrize("how", [{}, {"target_modules": ["query"], "modules_to_save": ["key"]}])
def test_an_adapter_that_the_model_does_not_use_is_refused(
    tmp_path: Path, spoil: str, mend: str, message: str, how: dict
) -> None:
    base = bert()
    model, source = lora(base, **how), lora(base, **how)
    source.save_pretrained(tmp_path)
    getattr(model.base_model, spoil)()
    with pytest.raises(ValueError, match=message) as caught:
        into(Wrapped(model), tmp_path)
    assert "\n" not in str(caught.value)
    getattr(model.base_model, mend)()
    assert_same(into(model, tmp_path), source.state_dict())


def test_an_adapter_is_refused_inside_the_context_that_disables_it(tmp_path: Path) -> None:
    model = lora(bert())
    model.save_pretrained(tmp_path)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"leave disable_adapter\(\)"):
        into(model, tmp_path)
    assert_same(into(model, tmp_path), model.state_dict())
