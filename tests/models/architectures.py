"Tiny models with random weights, of every architecture that the tests adapt, and an input for each."

import torch
import transformers as hf

from dora_nb.models.adapt import adapter_layers

IDS = torch.arange(3, 23)[None].repeat(2, 1) % 60
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
GROUPED = SIZES | dict(num_key_value_heads=2)
ENCODER_DECODER = dict(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4
) | dict(
    encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1
)
IMAGES = dict(image_size=16, patch_size=8)


def text(kind, config, **sizes):
    return lambda: (getattr(hf, kind)(getattr(hf, config)(**sizes)), dict(input_ids=IDS, labels=IDS))


def classifier(kind, config, **sizes):
    model = lambda: getattr(hf, kind)(getattr(hf, config)(**sizes, num_labels=2, pad_token_id=0))
    return lambda: (model(), dict(input_ids=IDS, labels=torch.tensor([0, 1])))


def clip():
    side = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = hf.CLIPConfig(
        text_config=side | dict(vocab_size=64, eos_token_id=22), vision_config=side | IMAGES, projection_dim=16
    )
    return hf.CLIPModel(config), dict(input_ids=IDS, pixel_values=torch.randn(2, 3, 16, 16), return_loss=True)


def vit():
    config = hf.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **IMAGES, num_labels=2)
    return hf.ViTForImageClassification(config), dict(
        pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])
    )


def whisper():
    config = hf.WhisperConfig(
        **ENCODER_DECODER, num_mel_bins=8, max_source_positions=10, max_target_positions=40, suppress_tokens=None
    )
    return hf.WhisperForConditionalGeneration(config), dict(input_features=torch.randn(2, 8, 20), labels=IDS)


ARCHITECTURES = {
    "llama": text("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "qwen2": text("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "qwen3": text("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
    "gemma3": text("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8),
    "mistral": text("MistralForCausalLM", "MistralConfig", **GROUPED),
    "phi3": text("Phi3ForCausalLM", "Phi3Config", **GROUPED, pad_token_id=0),
    "gpt_neox": text("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
    "opt": text(
        "OPTForCausalLM",
        "OPTConfig",
        **dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64),
        word_embed_proj_dim=32,
    ),
    "gpt2": text("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    "falcon": text(
        "FalconForCausalLM", "FalconConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "bloom": text("BloomForCausalLM", "BloomConfig", vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "mpt": text("MptForCausalLM", "MptConfig", vocab_size=64, d_model=32, n_layers=2, n_heads=4),
    "gptj": text("GPTJForCausalLM", "GPTJConfig", vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "mamba": text("MambaForCausalLM", "MambaConfig", vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2),
    "mixtral": text("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
    "t5": text(
        "T5ForConditionalGeneration",
        "T5Config",
        **dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0),
    ),
    "bart": text("BartForConditionalGeneration", "BartConfig", **ENCODER_DECODER),
    "bert": classifier("BertForSequenceClassification", "BertConfig", **SIZES),
    "roberta": classifier("RobertaForSequenceClassification", "RobertaConfig", **SIZES),
    "distilbert": classifier(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        **dict(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    ),
    "deberta": classifier("DebertaV2ForSequenceClassification", "DebertaV2Config", **SIZES),
    "clip": clip,
    "vit": vit,
    "whisper": whisper,
}


WIDE = dict(
    wide_llama=text("LlamaForCausalLM", "LlamaConfig", **GROUPED | dict(hidden_size=128, intermediate_size=192))
)


def build(name):
    "Return a model of an architecture in eval mode, the same at every call, and its input."
    torch.manual_seed(0)
    model, inputs = (ARCHITECTURES | WIDE)[name]()
    return model.eval(), inputs


def output(model, inputs):
    "Return a model's main output, a tensor."
    out = model(**inputs)
    return out.logits if "logits" in out else out.logits_per_image


def shake(model):
    "Move every adapter away from its start."
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_B.normal_(std=0.2)
            if hasattr(layer, "magnitude"):
                layer.magnitude *= 0.7 + 0.6 * torch.rand_like(layer.magnitude)
    return model
