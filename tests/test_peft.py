"Against PEFT, an independent implementation: files both ways, logits, gradients."

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dora_nb.adapt import AdapterConfig, adapt, load_adapter, save_adapter

SETTINGS = [
    dict(),
    dict(use_rslora=True),
    dict(r=3, lora_alpha=1, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"]),
    dict(target_modules="all-linear"),
]


def shaken_peft(model, use_dora, settings):
    "A PEFT model with a random, non-zero adapter."
    torch.manual_seed(2)
    model = get_peft_model(
        model,
        LoraConfig(
            **dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=use_dora) | settings
        ),
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
        elif "magnitude" in name:
            p.data *= 0.5 + torch.rand_like(p)
    return model.eval()


@pytest.mark.parametrize("use_dora", (False, True))
@pytest.mark.parametrize("settings", SETTINGS)
def test_we_load_pefts(llama, ids, tmp_path, use_dora, settings):
    theirs = shaken_peft(llama(), use_dora, settings)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours(ids).logits, llama()(ids).logits, atol=1e-2)


@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(rslora=True), dict(target_modules="all-linear"), dict(target_modules=r".*\.layers\.0\..*_proj")],
)
def test_peft_loads_ours(llama, shake, ids, tmp_path, method, settings):
    ours = shake(adapt(llama(), AdapterConfig(method, rank=5, alpha=7, **settings)))
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours(ids).logits, llama()(ids).logits, atol=1e-2)


def test_there_and_back_keeps_every_tensor(llama, shake, tmp_path):
    from safetensors.torch import load_file

    save_adapter(shake(adapt(llama(), AdapterConfig("dora"))), tmp_path / "ours")
    PeftModel.from_pretrained(llama(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("use_dora", (False, True))
def test_gradients_are_pefts(llama, ids, tmp_path, use_dora):
    "PEFT detaches the norm as we do, so one backward pass must agree parameter by parameter."
    theirs = shaken_peft(llama(), use_dora, {})
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(llama(), tmp_path)
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    theirs_by_name = {
        n.replace("base_model.model.", "")
        .replace(".default", "")
        .replace(".weight", "")
        .replace("lora_magnitude_vector", "magnitude"): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    if not theirs_by_name:  # loading freezes nothing here; a silent pass would prove nothing
        pytest.fail("PEFT computed no gradients")
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, theirs_by_name[name], atol=1e-6, rtol=1e-4)
