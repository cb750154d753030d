"Nothing that was trained is lost: over architectures, against PEFT, through Trainer."

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from dora_nb.models.adapt import adapt, adapter_layers, adapter_state, count_parameters, trainable_parameters
from dora_nb.models.adapter_files import load_adapter, save_adapter
from dora_nb.models.disable import disable_adapter
from dora_nb.models.merge import merge, remove_adapter, unmerge
from dora_nb.models.methods import AdapterConfig
from dora_nb.models.peft_format import CONFIG, WEIGHTS

_SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
_TEXT = dict(input_ids=torch.arange(2, 22).view(2, 10))
_BLOCKS = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
_BLOCKS |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48)
_BOTH = _TEXT | dict(decoder_input_ids=torch.arange(3, 15).view(2, 6))
_SOUND = dict(input_features=torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(0)))

_ENDED = dict(input_ids=torch.cat([torch.arange(3, 21).view(2, 9), torch.full((2, 1), 2)], 1))  # one end of text each


class Extended(tf.BertForSequenceClassification):
    "A class of one's own, whose head is as new as that of the class it extends."


# name → class, configuration, inputs, modules to save, task type in PEFT
MODELS = {
    "llama": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig(**_SIZES, attention_bias=True, tie_word_embeddings=False),
        _TEXT,
        ["model.norm", "lm_head"],
        "CAUSAL_LM",
    ),
    "tied llama": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig(**_SIZES, tie_word_embeddings=True),
        _TEXT,
        ["embed_tokens"],
        "CAUSAL_LM",
    ),
    "gpt-neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**_SIZES), _TEXT, ["embed_in"], "CAUSAL_LM"),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**_SIZES), _TEXT, ["pooler", "classifier"], "SEQ_CLS"),
    "bert tokens": (tf.BertForTokenClassification, tf.BertConfig(**_SIZES), _TEXT, None, "TOKEN_CLS"),
    "extended bert": (Extended, tf.BertConfig(**_SIZES), _TEXT, None, "SEQ_CLS"),
    "bart classifier": (  # PEFT does not train `classification_head` by itself
        tf.BartForSequenceClassification,
        tf.BartConfig(**_BLOCKS, vocab_size=64, max_position_embeddings=64, eos_token_id=2),
        _ENDED,
        None,
        None,
    ),
    "bert questions": (  # PEFT's wrapper of the task type QUESTION_ANS would drop `token_type_ids`
        tf.BertForQuestionAnswering,
        tf.BertConfig(**_SIZES),
        _TEXT | dict(token_type_ids=torch.arange(20).view(2, 10) % 2),
        None,
        None,
    ),
    "bert choices": (  # PEFT has no such task type
        tf.BertForMultipleChoice,
        tf.BertConfig(**_SIZES),
        dict(input_ids=torch.arange(3, 27).view(2, 3, 4)),
        None,
        None,
    ),
    "xlm": (  # its head is called `sequence_summary`, which PEFT does not know
        tf.XLMForSequenceClassification,
        tf.XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=2),
        _TEXT,
        None,
        None,
    ),
    "electra choices": (  # a `sequence_summary` lies beside the `classifier`
        tf.ElectraForMultipleChoice,
        tf.ElectraConfig(**_SIZES, embedding_size=32),
        dict(input_ids=torch.arange(3, 27).view(2, 3, 4)),
        None,
        None,
    ),
    "deberta": (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config(**_SIZES), _TEXT, None, "SEQ_CLS"),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**_SIZES), _TEXT, None, "SEQ_CLS"),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=2),
        _TEXT,
        ["pre_classifier", "classifier"],
        "SEQ_CLS",
    ),
    "bert without a head": (tf.BertModel, tf.BertConfig(**_SIZES), _TEXT, ["pooler"], None),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0),
        _BOTH,
        ["final_layer_norm"],
        "SEQ_2_SEQ_LM",
    ),
    "bart": (
        tf.BartForConditionalGeneration,
        tf.BartConfig(
            **_BLOCKS,
            vocab_size=64,
            max_position_embeddings=64,
        ),
        _BOTH,
        ["layernorm_embedding"],
        "SEQ_2_SEQ_LM",
    ),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        ),
        dict(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))),
        ["classifier"],
        None,
    ),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig(
            vocab_size=64,
            num_mel_bins=8,
            **_BLOCKS,
            max_source_positions=30,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        _SOUND | dict(decoder_input_ids=torch.arange(3, 15).view(2, 6)),
        ["conv2"],
        None,
    ),
}
TINY = pytest.mark.parametrize("name", MODELS)


def make(name, seed=0, dtype=None):
    kind, config, *_ = MODELS[name]
    torch.manual_seed(seed)
    return kind(copy.deepcopy(config)).eval()


def shake(model, seed=1):
    "Change all that is trained by random noise."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def outputs(model, name):
    with torch.no_grad():
        return model(**MODELS[name][2])[0]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def by_peft(name, folder, base=None):
    "The outputs of PEFT's wrapper around the base model; a tensor that PEFT misses is an error."
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return outputs(PeftModel.from_pretrained(base or make(name), folder).eval(), name)


def configured(name, method, **changes):
    return AdapterConfig(method, rank=3, target_modules="all-linear", **dict(modules_to_save=MODELS[name][3]) | changes)


@pytest.mark.parametrize("bias", ("none", "all", "lora_only"))
@pytest.mark.parametrize("method", ("lora", "dora"))
@TINY
def test_what_was_trained_is_saved(name, method, bias, tmp_path):
    "Here and in PEFT; and removed again, nothing is left of it."
    plain = outputs(make(name), name)
    ours = shake(adapt(make(name), configured(name, method, bias=bias)))
    trained = outputs(ours, name)
    assert not torch.allclose(trained, plain, atol=1e-3)
    save_adapter(ours, tmp_path)
    again = load_adapter(make(name), tmp_path)
    assert torch.equal(outputs(again, name), trained)
    assert trainable_parameters(again).keys() == trainable_parameters(ours).keys()
    assert count_parameters(again) == count_parameters(ours)
    close(by_peft(name, tmp_path), trained)
    assert torch.equal(outputs(remove_adapter(again), name), plain)
    assert make(name).state_dict().keys() == again.state_dict().keys() and not vars(again).get("save_pretrained")


@TINY
def test_the_task_types_are_those_that_peft_s_wrapper_takes(name, tmp_path):
    save_adapter(adapt(make(name), configured(name, "lora")), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == MODELS[name][4]


@TINY
def test_merging_and_disabling(name, tmp_path):
    plain = outputs(make(name), name)
    ours = shake(adapt(make(name), configured(name, "dora", bias="all")))
    trained = outputs(ours, name)
    with disable_adapter(ours), disable_adapter(ours):
        assert torch.equal(outputs(ours, name), plain)
    assert torch.equal(outputs(ours, name), trained)
    if name not in ("tied llama",):
        close(outputs(merge(ours), name), trained)
    with pytest.raises(KeyError), disable_adapter(ours):
        assert torch.equal(outputs(ours, name), plain)
        raise KeyError
    merged = outputs(ours, name)
    ours.save_pretrained(tmp_path / "merged")
    if adapter_state(ours).merged:
        close(outputs(MODELS[name][0].from_pretrained(tmp_path / "merged").eval(), name), merged)
        assert not (tmp_path / "merged" / CONFIG).exists()
    save_adapter(ours, tmp_path / "adapter")  # merged or not
    assert torch.equal(outputs(unmerge(ours), name), trained)
    assert torch.equal(outputs(load_adapter(make(name), tmp_path / "adapter"), name), trained)
    assert torch.equal(outputs(remove_adapter(ours), name), plain)


BY_HAND = {
    "llama": "lm_head",
    "tied llama": "model.embed_tokens",
    "gpt-neox": "gpt_neox.final_layer_norm",
    "bert": "bert.embeddings.LayerNorm",
    "bert tokens": "bert.embeddings.word_embeddings",
    "extended bert": "bert.embeddings.LayerNorm",
    "bart classifier": "classification_head.out_proj",
    "bert questions": "qa_outputs",
    "bert choices": "bert.pooler",
    "xlm": "sequence_summary",
    "electra choices": "sequence_summary",
    "deberta": "pooler",
    "roberta": "classifier.out_proj",  # a part of a head
    "distilbert": "pre_classifier",
    "bert without a head": "pooler",
    "t5": "shared",
    "bart": "model.shared",
    "vit": "classifier",
    "whisper": "model.encoder.conv1",
}


@TINY
def test_what_was_unfrozen_by_hand_is_saved(name, tmp_path):
    module = BY_HAND[name]
    config = AdapterConfig(
        "lora", rank=2, target_modules=r".*(q_proj|query|query_proj|q_lin|query_key_value|\.q)", modules_to_save=()
    )
    ours = adapt(make(name), config)
    ours.get_submodule(module).requires_grad_(True)
    shake(ours)
    trained = outputs(ours, name)
    with pytest.raises(RuntimeError, match=rf"{module}.* was unfrozen after adapt"), disable_adapter(ours):
        pass
    save_adapter(ours, tmp_path)
    assert torch.equal(outputs(load_adapter(make(name), tmp_path), name), trained)
    close(by_peft(name, tmp_path), trained)
    close(outputs(merge(ours), name), trained)
    with pytest.warns(UserWarning, match=rf"{module}.* was unfrozen after adapt"):
        remove_adapter(ours)


@pytest.mark.attack("data loss")
def test_a_head_that_was_unfrozen_by_hand_is_not_lost(tmp_path):
    ours = adapt(make("bert"), AdapterConfig(target_modules=["query"], modules_to_save=()))
    ours.classifier.requires_grad_(True)
    save_adapter(shake(ours), tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["modules_to_save"] == ["classifier"] and fields["task_type"] == "SEQ_CLS"
    assert torch.equal(load_adapter(make("bert"), tmp_path).classifier.weight, ours.classifier.weight)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.block(x) * self.scale


@pytest.mark.parametrize(
    "what,named",
    [
        ("scale", "'scale' .*belongs to the model itself"),
        ("block.0.base_layer.weight", "'block.0.base_layer.weight' .*part of an adapted layer"),
        ("block.0.base_layer.bias", "part of an adapted layer; AdapterConfig.bias='lora_only'. trains it"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(what, named, tmp_path):
    model = adapt(Bare(), AdapterConfig("lora", rank=2, target_modules=["0"]))
    model.get_parameter(what).requires_grad_(True)
    with pytest.raises(RuntimeError, match=named + ".*Freeze it, or merge"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_parameter_beside_adapted_layers_is_refused(tmp_path):
    model = adapt(make("vit"), AdapterConfig("lora", rank=2, target_modules="all-linear"))
    model.vit.register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(RuntimeError, match="'vit.extra'.*its module 'vit' holds adapted layers"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize(
    "name, head",
    [
        ("bert", "classifier"),
        ("extended bert", "classifier"),
        ("bart classifier", "classification_head"),
        ("bert questions", "qa_outputs"),
        ("bert choices", "classifier"),
        ("xlm", "sequence_summary"),
        ("electra choices", "sequence_summary"),
        ("deberta", "pooler"),
    ],
)
@pytest.mark.parametrize("compiled", (False, True))
def test_a_new_head_is_trained_without_being_named(name, head, compiled):
    model = make(name)
    adapt(
        torch.compile(model, backend="eager") if compiled else model, AdapterConfig(rank=2, target_modules="all-linear")
    )
    weights = {n: p for n, p in model.named_parameters() if n.startswith(f"{head}.")}
    assert weights and all(p.requires_grad and "lora" not in n for n, p in weights.items())


class TwoForSequenceClassification(tf.BertPreTrainedModel):
    "A classifier with a second encoder, and with a head whose names others end with."

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.roberta = tf.BertModel(config), tf.RobertaModel(config)
        self.dense, self.out = nn.Linear(64, 32), nn.Linear(32, 2)
        self.post_init()


class OwnForSequenceClassification(tf.BertPreTrainedModel):
    "A classifier whose base model has not the name that its class gives."

    def __init__(self, config, head="classification_head"):
        super().__init__(config)
        self.body = tf.BertModel(config)
        self.add_module(head, nn.Linear(32, 2))
        self.post_init()


def test_a_head_is_no_second_encoder_and_a_part_that_stays_frozen_is_named():
    config = AdapterConfig(rank=2, target_modules=["query"])
    with pytest.warns(UserWarning, match=r"'dense' beside the base model stays frozen, .*'dense'.* would train 'bert"):
        two = adapt(TwoForSequenceClassification(tf.BertConfig(**_SIZES)), config)
    trained = {name for name in trainable_parameters(two) if ".lora_" not in name and "magnitude" not in name}
    assert trained == {"out.weight", "out.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = adapt(OwnForSequenceClassification(tf.BertConfig(**_SIZES)), config)
    assert own.classification_head.weight.requires_grad
    with pytest.warns(UserWarning, match="no new head was found in this OwnForSequenceClassification; if it has one"):
        adapt(OwnForSequenceClassification(tf.BertConfig(**_SIZES), "top"), config)


def test_modules_that_do_not_exist_and_targets_inside_them():
    with pytest.raises(ValueError, match="modules_to_save: 'clasifier' matches no module; .*bert, dropout, classifier"):
        adapt(model := make("bert"), AdapterConfig(target_modules=["query"], modules_to_save=["clasifier"]))
    assert not adapter_layers(model)
    with pytest.raises(ValueError, match="all targets are in modules_to_save"):
        adapt(model, AdapterConfig(target_modules=["pooler.dense"], modules_to_save=["pooler"]))
    with pytest.raises(ValueError, match="modules_to_save='classifier' must be a list"):
        AdapterConfig(modules_to_save="classifier")
    with pytest.raises(ValueError, match="bias='yes' does not exist"):
        AdapterConfig(bias="yes")


# ---------------------------------------------------------------- PEFT's files


THEIRS = [
    dict(),
    dict(bias="all"),
    dict(bias="lora_only"),
    dict(modules_to_save="default"),
    dict(modules_to_save="default", bias="all"),
]


@pytest.mark.parametrize("use_dora", (False, True))
@pytest.mark.parametrize("settings", THEIRS, ids=str)
@TINY
def test_peft_s_files(name, settings, use_dora, tmp_path):
    *_, modules, task = MODELS[name]
    whole = modules and list(modules)  # PEFT changes the list
    settings = {k: whole if k == "modules_to_save" else v for k, v in settings.items()}
    targets = r".*(q_proj|query|query_proj|q_lin|query_key_value|\.q)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        config = LoraConfig(task_type=task, target_modules=targets, r=3, use_dora=use_dora, **settings)
        theirs = shake(get_peft_model(make(name), config)).eval()
        theirs.save_pretrained(tmp_path)
        ours = load_adapter(make(name), tmp_path)
    close(outputs(ours, name), outputs(theirs, name))
    save_adapter(ours, tmp_path / "ours")
    close(by_peft(name, tmp_path / "ours"), outputs(theirs, name))
    assert torch.equal(outputs(remove_adapter(ours), name), outputs(make(name), name))


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("trained", (False, True))
def test_new_tokens(llama, ids, tied, trained, tmp_path):
    "Resized embeddings are saved, with and without training; a model that was not resized is refused by name."
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def fresh(tokens=131):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        if tokens:
            model.resize_token_embeddings(tokens)
        return model

    ids = torch.cat([ids, torch.tensor([[128], [129], [130]])], 1)
    modules = ["embed_tokens", "lm_head"] if trained else ()
    ours = shake(adapt(fresh(), AdapterConfig(rank=3, modules_to_save=modules)))
    save_adapter(ours, tmp_path / "ours")
    again = fresh()
    base = again(ids).logits
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(ids).logits, ours(ids).logits)
    save_adapter(again, tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / "ours" / WEIGHTS).keys()
    assert torch.equal(remove_adapter(again)(ids).logits, base)
    theirs = PeftModel.from_pretrained(fresh(), tmp_path / "ours")
    close(theirs(ids).logits, ours(ids).logits)
    with pytest.raises(
        ValueError, match=r"for 131 tokens, and this model has 128; call model.resize_token_embeddings\(131\)"
    ):
        load_adapter(fresh(0), tmp_path / "ours")


@pytest.mark.parametrize("tied", (False, True))
def test_new_tokens_of_peft(llama, ids, tied, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def fresh(tokens=131):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(tokens)
        return model

    theirs = shake(get_peft_model(fresh(), LoraConfig(target_modules=["q_proj"], r=3)))
    with pytest.warns(UserWarning, match="has been resized"):
        theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.cat([ids, torch.tensor([[128], [129], [130]])], 1)
    close(load_adapter(fresh(), tmp_path / "theirs")(ids).logits, theirs(ids).logits)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        load_adapter(fresh(130), tmp_path / "theirs")


def test_single_trained_tokens_are_refused_with_a_way_out(llama, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5])
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trainable_token_indices=.*PEFT can merge it"):
        load_adapter(llama(), tmp_path)


# ---------------------------------------------------------------- copies, disabling


@pytest.mark.parametrize(
    "how", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("copy", "pickle")
)
def test_copies_save_themselves(how, tmp_path):
    ours = shake(adapt(make("bert"), configured("bert", "dora", bias="all")))
    other = how(ours)
    shake(other, seed=5)
    del ours
    other.save_pretrained(tmp_path)
    again = load_adapter(make("bert"), tmp_path)
    assert torch.equal(outputs(again, "bert"), outputs(other, "bert"))
    with disable_adapter(other):
        assert torch.equal(outputs(other, "bert"), outputs(make("bert"), "bert"))


def test_a_deleted_model_is_freed():
    import gc
    import weakref

    model = adapt(make("bert"), AdapterConfig(target_modules=["query"]))
    there = weakref.ref(model.classifier.weight)
    del model
    gc.collect()
    assert there() is None


def test_methods_work_on_a_model_that_nothing_else_holds(tmp_path):
    adapt(make("llama"), AdapterConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    merge(load_adapter(make("llama"), tmp_path / "adapter")).save_pretrained(tmp_path / "merged")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "merged" / "config.json").exists()


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("content", ("a model", "no tensors"))
def test_a_checkpoint_of_a_model_is_not_replaced_by_an_adapter(tmp_path, content):
    "As when a model was loaded from a folder of Trainer, and its adapter is saved there."
    folder = tmp_path / "checkpoint-10"
    make("bert").save_pretrained(folder)
    if content == "no tensors":
        (folder / "model.safetensors").write_text("precious")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = adapt(make("bert"), AdapterConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="model.safetensors holds the weights of a model.*choose another folder"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for _ in range(2):  # its own file is replaced
        model.save_pretrained(tmp_path / "checkpoint-20")
    assert sorted(p.name for p in (tmp_path / "checkpoint-20").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors",
    ]


def test_inside_disable_adapter_nothing_is_saved_or_changed(tmp_path):
    model = adapt(make("bert"), AdapterConfig(target_modules=["query"]))
    with disable_adapter(model):
        for action in (
            merge,
            unmerge,
            remove_adapter,
            lambda m: save_adapter(m, tmp_path),
            lambda m: m.save_pretrained(tmp_path),
        ):
            with pytest.raises(RuntimeError, match="leave the context of disable_adapter"):
                action(model)
        with pytest.raises(RuntimeError, match="adapted already"):
            adapt(model, AdapterConfig())
    for wrong in (make("bert"), adapt(make("bert"), AdapterConfig("full"))):
        with pytest.raises(RuntimeError), disable_adapter(wrong):
            pass


def test_a_second_adapter_is_refused_with_a_way(tmp_path):
    model = adapt(make("bert"), AdapterConfig(target_modules=["query"]))
    save_adapter(model, tmp_path)
    for action in (lambda: adapt(model, AdapterConfig()), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(RuntimeError, match=r"remove_adapter.*PEFT.*dora_nb.accelerate\(peft_model\)"):
            action()


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_swap_of_values_is_seen_at_once(llama, method):
    "As an average of weights is swapped in for evaluation: no scale of the values before is used, for one token or many."
    model = shake(adapt(llama(), AdapterConfig(method, rank=3)))
    fresh = shake(adapt(llama(), AdapterConfig(method, rank=3)), seed=7)
    for ids in (torch.tensor([[5]]), torch.arange(40).view(2, 20)):
        with torch.no_grad():
            model(ids)
            before = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
            for n, p in trainable_parameters(fresh).items():
                model.get_parameter(n).data.copy_(p.data)
            assert torch.equal(model(ids).logits, fresh(ids).logits)
            for n, p in before.items():
                model.get_parameter(n).data.copy_(p)


# ---------------------------------------------------------------- Trainer


def train(model, out, resume=None, steps=6, seed=0, **changes):
    "Six steps of Trainer with a checkpoint every two."
    torch.manual_seed(seed)
    settings = dict(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
        save_strategy="steps",
    )
    rows = [dict(input_ids=torch.arange(i, i + 8) % 60 + 2, labels=torch.tensor(i % 2)) for i in range(24)]
    trainer = tf.Trainer(model, tf.TrainingArguments(**settings | changes), train_dataset=rows, eval_dataset=rows[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def kept(model):
    return {n: p.detach().clone() for n, p in trainable_parameters(model).items()}


@pytest.mark.long
@pytest.mark.parametrize("bias", ("none", "all"))
def test_trainer_saves_adapters_and_resumes(bias, tmp_path, caplog):
    fresh = lambda: adapt(
        make("bert"), AdapterConfig(rank=3, target_modules=["query", "value"], dropout=0.1, bias=bias)
    )
    model = fresh()
    train(model, tmp_path / "whole")
    whole = kept(model)
    folder = tmp_path / "whole" / "checkpoint-6"
    assert {CONFIG, WEIGHTS} <= {p.name for p in folder.iterdir()}
    assert not any(".base_layer.weight" in key for key in load_file(folder / WEIGHTS))
    assert torch.equal(outputs(load_adapter(make("bert"), folder), "bert"), outputs(model.eval(), "bert"))
    close(by_peft("bert", folder), outputs(model, "bert"))

    resumed = fresh()
    with caplog.at_level("WARNING"):
        train(resumed, tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-2"))
    assert "missing keys" not in caplog.text
    assert all(torch.equal(p, whole[n]) for n, p in kept(resumed).items())


@pytest.mark.long
def test_trainer_loads_its_best_checkpoint(tmp_path):
    model = adapt(make("bert"), AdapterConfig(rank=3, target_modules=["query", "value"]))
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_total_limit=3)
    trainer = train(model, tmp_path, **best, learning_rate=0.3)  # the loss rises again
    folder = Path(trainer.state.best_model_checkpoint)
    assert torch.equal(outputs(model.eval(), "bert"), outputs(load_adapter(make("bert"), folder), "bert"))


@pytest.mark.parametrize("prefix", ("", "_orig_mod.", "module."))
def test_a_gathered_state_dict_is_saved(prefix, tmp_path):
    "As accelerate gives it: names of wrappers are not part of the file, and an incomplete one is refused."
    model = shake(adapt(make("bert"), configured("bert", "dora", bias="all")))
    state = {f"{prefix}{k}": v.clone() for k, v in model.state_dict().items()}
    trained = outputs(model, "bert")
    shake(model, seed=9)  # what is saved comes from the state dict
    model.save_pretrained(tmp_path / "one", state_dict=state)
    assert torch.equal(outputs(load_adapter(make("bert"), tmp_path / "one"), "bert"), trained)
    model.save_pretrained(tmp_path / "none", state_dict={}, is_main_process=False)
    assert not (tmp_path / "none").exists()
    state.pop(f"{prefix}classifier.bias")
    with pytest.raises(ValueError, match="state_dict lacks 'classifier.bias'"):
        model.save_pretrained(tmp_path / "two", state_dict=state)


def test_an_adapter_s_file_must_fit_to_be_resumed(tmp_path):
    "No value stays as it was without a word."
    model = adapt(make("bert"), configured("bert", "dora"))
    model.save_pretrained(tmp_path / "checkpoint-2")
    tensors = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert os.path.samefile(tmp_path / "checkpoint-2" / "model.safetensors", tmp_path / "checkpoint-2" / WEIGHTS)
    other = adapt(make("bert"), configured("bert", "dora", bias="all"))
    with pytest.raises(RuntimeError, match="lacks '.*bias'.*adapt the model as before"):
        other.load_state_dict(tensors, False)
    narrow = adapt(make("bert"), configured("bert", "lora"))
    with pytest.raises(RuntimeError, match="holds '.*lora_magnitude_vector'"):
        narrow.load_state_dict(tensors, False)
    assert model.load_state_dict(model.state_dict()).missing_keys == []


@pytest.mark.parametrize("init", ("pissa", "olora"))
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_start_that_is_subtracted_is_resumed(init, method, tmp_path):
    "The file holds [A; A₀]: the layer takes both back, also if its own start came out otherwise."
    model = adapt(make("bert"), configured("bert", method, init=init))
    shake(model)
    trained = outputs(model, "bert")
    model.save_pretrained(tmp_path / "checkpoint-2")
    again = adapt(make("bert"), configured("bert", method, init=init))
    for layer in adapter_layers(again).values():
        layer.start_A += 0.1
    found = again.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), False)
    assert found.unexpected_keys == [] and torch.equal(outputs(again, "bert"), trained)
    wrong = adapt(make("bert"), dataclasses.replace(configured("bert", method, init=init), rank=2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wrong.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), False)


def test_a_module_that_was_replaced_after_adapt_is_saved_as_it_is(tmp_path):
    model = adapt(make("bert"), AdapterConfig(rank=2, target_modules=["query"]))
    model.classifier = nn.Linear(*reversed(model.classifier.weight.shape))
    shake(model)
    save_adapter(model, tmp_path)
    assert torch.equal(outputs(load_adapter(make("bert"), tmp_path), "bert"), outputs(model, "bert"))
    for action in (lambda: remove_adapter(model), lambda: disable_adapter(model).__enter__()):
        with pytest.raises(RuntimeError, match="the module of 'classifier.weight' was replaced after adapt"):
            action()


def test_new_tokens_of_a_base_model_that_is_gone(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    adapt(model, AdapterConfig(rank=2))
    save_adapter(model, tmp_path / "one")
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "one" / WEIGHTS)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="not on this machine.*name the embeddings in modules_to_save") as caught:
        save_adapter(model, tmp_path / "two")
    assert [w.filename for w in caught] == [__file__]
    named = adapt(make("llama"), AdapterConfig(rank=2, modules_to_save=["embed_tokens", "lm_head"]))
    vit = adapt(make("vit"), AdapterConfig(rank=2))
    for silent in (named, vit):
        silent.config.name_or_path = model.config.name_or_path
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # where no embedding is at stake, and while loading
            silent.load_state_dict(load_file(save_adapter(silent, tmp_path / silent.config.model_type) / WEIGHTS))


@pytest.mark.long
def test_full_fine_tuning_is_saved_as_before(tmp_path):
    model = adapt(make("bert"), AdapterConfig("full"))
    train(model, tmp_path, steps=2)
    assert not (tmp_path / "checkpoint-2" / CONFIG).exists()
    again = tf.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert torch.equal(outputs(again, "bert"), outputs(model.eval(), "bert"))


SFT = """
import sys
sys.path.insert(0, sys.argv[2])
import datasets, torch, transformers as tf
from trl import SFTConfig, SFTTrainer
from dora_nb import AdapterConfig, adapt, load_adapter

def fresh():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, tie_word_embeddings=False)).eval()

def train(model, resume=None):
    rows = datasets.Dataset.from_list([dict(input_ids=[(i + j) % 60 + 2 for j in range(8)]) for i in range(24)])
    config = SFTConfig(output_dir=sys.argv[1], max_steps=6, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
                       report_to=[], disable_tqdm=True, learning_rate=1e-2, bf16=False, gradient_checkpointing=False)
    SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train(resume_from_checkpoint=resume)
    return model.eval()

from tokenizers import Tokenizer
from tokenizers.models import BPE
vocab = {chr(60 + i): i for i in range(62)} | {"<pad>": 62, "</s>": 63}
tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, [])), pad_token="<pad>", eos_token="</s>")
ids = torch.arange(2, 22).view(2, 10)
whole = train(adapt(fresh(), AdapterConfig(rank=3, modules_to_save=["lm_head"])))
again = load_adapter(fresh(), sys.argv[1] + "/checkpoint-6")
assert torch.equal(again(ids).logits, whole(ids).logits)
resumed = train(adapt(fresh(), AdapterConfig(rank=3, modules_to_save=["lm_head"])), sys.argv[1] + "/checkpoint-2")
assert torch.equal(resumed(ids).logits, whole(ids).logits)
print("same")
"""


@pytest.mark.long
def test_trl(tmp_path):
    "Supervised fine-tuning by TRL, which is kept apart from the environment, if it is there at all."
    extras = Path(sys.executable).parent.parent / "extras"
    if not (extras / "trl").exists():
        pytest.skip("TRL is not installed")
    done = subprocess.run([sys.executable, "-c", SFT, str(tmp_path), str(extras)], capture_output=True, text=True)
    assert done.returncode == 0 and "same" in done.stdout, done.stderr[-3000:]
