"""Real models of many families in small configurations, with example inputs; nothing is downloaded.

Libraries are imported when a factory is called, so that the table itself can be read without them.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tests.real_models.hard import HARD

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Factory = Callable[[], Example]

_VOCABULARY = 64
_LENGTH = 10


def images(channels: int = 3, size: int = 64, batch: int = 2) -> Tensor:
    """Return a batch of random images [batch, channels, size, size]."""
    return torch.randn(batch, channels, size, size)


def tokens(batch: int = 2, length: int = _LENGTH) -> Tensor:
    """Return random token ids [batch, length], none of them one of the first few, which mark padding and the like."""
    return torch.randint(5, _VOCABULARY, (batch, length))


def shim() -> None:
    """Make torchvision importable beside a CPU build of torch, where it is installed at all."""
    if find_spec("torchvision") is not None:
        importlib.import_module("tests.real_models.torchvision_shim")


def torchvision_model(name: str, size: int = 64, **options: Any) -> Example:
    """Return a torchvision model of any kind by its registered name."""
    shim()
    models = importlib.import_module("torchvision.models")
    return models.get_model(name, weights=None, **options), (images(size=size),), {}


def detector(name: str) -> Example:
    """Return a torchvision detector, which takes lists of images and of targets."""
    shim()
    models = importlib.import_module("torchvision.models.detection")
    sized = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 96}
    few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16}
    options = {**sized, **(few if name.startswith("fasterrcnn") else {})}
    model = getattr(models, name)(weights=None, weights_backbone=None, num_classes=4, **options)
    boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [20.0, 30.0, 80.0, 90.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    return model, ([torch.rand(3, 96, 96), torch.rand(3, 96, 96)], [target, dict(target)]), {}


def timm_model(name: str, size: int = 64, **options: Any) -> Example:
    """Return a timm model by its name."""
    shim()
    return (
        importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **options),
        (images(size=size),),
        {},
    )


_TEXT: Mapping[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def transformer(
    model: str, config: str, inputs: Mapping[str, Callable[[], Any]] | None = None, **options: Any
) -> Example:
    """Return a model of transformers in a small configuration.

    Args:
        model: The model's class.
        config: Its configuration's class.
        inputs: Keyword inputs by name; token ids and their labels by default.
        options: Settings beside, or instead of, the small defaults.
    """
    shim()
    library = importlib.import_module("transformers")
    settings = {key: value for key, value in {**_TEXT, **options}.items() if value is not ...}
    made = getattr(library, model)(getattr(library, config)(**settings))
    ids = tokens()
    named = (
        {"input_ids": ids, "labels": ids.clone()} if inputs is None else {name: make() for name, make in inputs.items()}
    )
    return made, (), named


def vision_transformer(model: str, config: str, size: int = 32, **options: Any) -> Example:
    """Return an image classifier of transformers in a small configuration."""
    inputs = {"pixel_values": lambda: images(size=size), "labels": lambda: torch.tensor([0, 1])}
    return transformer(model, config, inputs, **{"vocab_size": ..., "pad_token_id": ..., "num_labels": 3, **options})


def graph_network(name: str, **options: Any) -> Example:
    """Return a ready-made network of torch-geometric with a small graph."""
    models = importlib.import_module("torch_geometric.nn.models")
    edges = torch.randint(0, 20, (2, 60))
    return getattr(models, name)(8, 16, 3, 4, **options), (torch.randn(20, 8), edges), {}


def _transformers_text() -> dict[str, Factory]:
    causal: dict[str, tuple[str, str, dict[str, Any]]] = {
        "gpt2": (
            "GPT2LMHeadModel",
            "GPT2Config",
            {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **_dropped()},
        ),
        "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2}),
        "mistral": ("MistralForCausalLM", "MistralConfig", {"num_key_value_heads": 2}),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"num_key_value_heads": 2}),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
        "gemma": ("GemmaForCausalLM", "GemmaConfig", {"num_key_value_heads": 2, "head_dim": 8}),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"num_key_value_heads": 2, "head_dim": 8}),
        "phi": ("PhiForCausalLM", "PhiConfig", {}),
        "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
        "gptj": (
            "GPTJForCausalLM",
            "GPTJConfig",
            {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        ),
        "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        "bloom": ("BloomForCausalLM", "BloomConfig", {"n_layer": 4, "n_head": 4}),
        "falcon": ("FalconForCausalLM", "FalconConfig", {}),
        "mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 8, "use_cache": False}),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 4}),
        "olmo": ("OlmoForCausalLM", "OlmoConfig", {}),
        "stablelm": ("StableLmForCausalLM", "StableLmConfig", {"num_key_value_heads": 2}),
    }
    masked: dict[str, tuple[str, str, dict[str, Any]]] = {
        "bert": ("BertForMaskedLM", "BertConfig", {}),
        "roberta": ("RobertaForMaskedLM", "RobertaConfig", {}),
        "distilbert": (
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            {"dim": 32, "hidden_dim": 64, "n_layers": 4, "n_heads": 4},
        ),
        "albert": ("AlbertForMaskedLM", "AlbertConfig", {"embedding_size": 16}),
        "electra": ("ElectraForMaskedLM", "ElectraConfig", {"embedding_size": 16}),
        "deberta-v2": (
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ),
        "mobilebert": (
            "MobileBertForMaskedLM",
            "MobileBertConfig",
            {"intra_bottleneck_size": 32, "embedding_size": 32},
        ),
        "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {"local_attention": 8}),
        "fnet": ("FNetForMaskedLM", "FNetConfig", {}),
        "squeezebert": ("SqueezeBertForMaskedLM", "SqueezeBertConfig", {"embedding_size": 32}),
        "longformer": ("LongformerForMaskedLM", "LongformerConfig", {"attention_window": 4}),
        "xlm": ("XLMWithLMHeadModel", "XLMConfig", {"emb_dim": 32, "n_layers": 4, "n_heads": 4}),
    }
    return {
        name: partial(transformer, model, config, **options)
        for name, (model, config, options) in {**causal, **masked}.items()
    }


def _dropped() -> dict[str, float]:
    return {"resid_pdrop": 0.1, "attn_pdrop": 0.1}


def _sequence_to_sequence() -> dict[str, Factory]:
    small = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    wide: dict[str, Any] = {**small, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    return {
        "t5": lambda: transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "bart": lambda: transformer("BartForConditionalGeneration", "BartConfig", **wide),
        "pegasus": lambda: transformer(
            "PegasusForConditionalGeneration", "PegasusConfig", **wide, decoder_start_token_id=0
        ),
        "whisper": lambda: transformer(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {"input_features": lambda: torch.randn(2, 8, 40), "labels": tokens},
            **wide,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=64,
            decoder_start_token_id=1,
        ),
    }


def _transformers_vision() -> dict[str, Factory]:
    small = {"image_size": 32, "patch_size": 8}
    return {
        "vit": lambda: vision_transformer("ViTForImageClassification", "ViTConfig", **small),
        "deit": lambda: vision_transformer("DeiTForImageClassification", "DeiTConfig", **small),
        "beit": lambda: vision_transformer("BeitForImageClassification", "BeitConfig", **small),
        "dinov2": lambda: vision_transformer("Dinov2ForImageClassification", "Dinov2Config", **small),
        "swin": lambda: vision_transformer(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_hidden_layers=...,
            num_attention_heads=...,
            hidden_size=...,
        ),
        "convnext": lambda: vision_transformer(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1]
        ),
        "segformer": lambda: vision_transformer(
            "SegformerForImageClassification",
            "SegformerConfig",
            size=64,
            hidden_sizes=[8, 16, 32, 64],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 4],
            num_hidden_layers=...,
        ),
        "resnet-hf": lambda: vision_transformer(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
        ),
        "poolformer": lambda: vision_transformer(
            "PoolFormerForImageClassification",
            "PoolFormerConfig",
            size=64,
            hidden_sizes=[8, 16, 32, 64],
            depths=[1, 1, 1, 1],
        ),
    }


def _ragged_mask() -> Tensor:
    mask = torch.ones(2, _LENGTH, dtype=torch.long)
    mask[1, _LENGTH // 2 :] = 0
    return mask


def _nothing_of_text() -> dict[str, Any]:
    """Return settings that take the defaults for text out of a configuration."""
    return dict.fromkeys(_TEXT, ...)


def _clip() -> Example:
    tower = {key: value for key, value in _TEXT.items() if key not in ("pad_token_id", "bos_token_id")}
    picture = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    inputs = {"input_ids": tokens, "pixel_values": lambda: images(size=32), "return_loss": lambda: True}
    settings = {
        "text_config": tower,
        "vision_config": {**picture, "image_size": 32, "patch_size": 8},
        "projection_dim": 16,
    }
    return transformer("CLIPModel", "CLIPConfig", inputs, **_nothing_of_text(), **settings)


def _wav2vec2() -> Example:
    convolutions = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_length": 2}
    inputs = {"input_values": lambda: torch.randn(2, 1600)}
    return transformer("Wav2Vec2ForCTC", "Wav2Vec2Config", inputs, **convolutions, **position)


def _patch_tst() -> Example:
    inputs = {"past_values": lambda: torch.randn(2, 32, 3), "future_values": lambda: torch.randn(2, 4, 3)}
    series = {
        "num_input_channels": 3,
        "context_length": 32,
        "prediction_length": 4,
        "patch_length": 8,
        "patch_stride": 8,
    }
    size = {"d_model": 16, "num_attention_heads": 4, "ffn_dim": 32, "num_hidden_layers": 2}
    return transformer("PatchTSTForPrediction", "PatchTSTConfig", inputs, **{**_nothing_of_text(), **series, **size})


def _detr() -> Example:
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
    backbone = {**backbone, "out_features": ["stage4"]}
    size = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    wide = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5, "num_labels": 4}
    settings = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone_config": backbone,
        **size,
        **wide,
    }
    inputs = {"pixel_values": lambda: images(size=64)}
    return transformer("DetrForObjectDetection", "DetrConfig", inputs, **{**_nothing_of_text(), **settings})


def _transformers_other() -> dict[str, Factory]:
    labelled = {"input_ids": tokens, "attention_mask": _ragged_mask, "labels": lambda: torch.tensor([0, 1])}
    return {
        "clip": _clip,
        "wav2vec2": _wav2vec2,
        "patch-tst": _patch_tst,
        "detr": _detr,
        "bert-classifier": lambda: transformer("BertForSequenceClassification", "BertConfig", labelled),
    }


def _torchvision() -> dict[str, Factory]:
    small = (
        "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 mobilenet_v2 mobilenet_v3_small efficientnet_b0 "
        "efficientnet_v2_s shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 regnet_y_400mf convnext_tiny vgg11_bn alexnet swin_t"
    ).split()
    table: dict[str, Factory] = {name: partial(torchvision_model, name) for name in small}
    table["googlenet"] = lambda: torchvision_model("googlenet", init_weights=False)
    table["inception_v3"] = lambda: torchvision_model("inception_v3", size=128, init_weights=False, aux_logits=False)
    table["vit_b_32"] = lambda: torchvision_model("vit_b_32", image_size=64)
    table["maxvit"] = _maxvit
    return table


def _maxvit() -> Example:
    shim()
    models = importlib.import_module("torchvision.models")
    blocks: dict[str, Any] = {"block_channels": [16, 32], "block_layers": [1, 2], "head_dim": 8, "num_classes": 10}
    made = models.MaxVit((64, 64), stem_channels=16, partition_size=4, stochastic_depth_prob=0.2, **blocks)
    return made, (images(),), {}


def _segmentation_and_detection() -> dict[str, Factory]:
    segmenters = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
    table: dict[str, Factory] = {
        name: partial(torchvision_model, name, weights_backbone=None, num_classes=4) for name in segmenters
    }
    for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn"):
        table[name] = partial(detector, name)
    return table


def _timm_convolutional() -> dict[str, Factory]:
    names = (
        "resnet26d seresnet18 ecaresnet26t resnest14d res2net50_14w_8s dla34 hrnet_w18_small dpn68 cspresnet50 vovnet39a "
        "mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_050 efficientnet_lite0 lcnet_050 repvgg_a0 regnetx_002 "
        "nf_resnet26 convnext_atto convnextv2_atto inception_next_tiny resnetv2_50 darknet17 selecsls42 skresnet18 rexnet_100"
    ).split()
    return {name: partial(timm_model, name) for name in names}


def _timm_attention() -> dict[str, Factory]:
    sized: dict[str, dict[str, Any]] = {
        "vit_tiny_patch16_224": {"img_size": 64},
        "deit_tiny_patch16_224": {"img_size": 64},
        "swin_tiny_patch4_window7_224": {"img_size": 56, "window_size": 7},
        "xcit_nano_12_p16_224": {},
        "eva02_tiny_patch14_224": {"img_size": 56},
        "mixer_s16_224": {"img_size": 64},
        "gmlp_ti16_224": {"img_size": 64},
        "resmlp_12_224": {"img_size": 64},
    }
    special = {"swin_tiny_patch4_window7_224": 56, "eva02_tiny_patch14_224": 56}
    table: dict[str, Factory] = {
        name: partial(timm_model, name, special.get(name, 64), **options) for name, options in sized.items()
    }
    for name in "mobilevit_xxs edgenext_xx_small poolformer_s12 caformer_s18 pvt_v2_b0".split():
        table[name] = partial(timm_model, name)
    table["efficientformerv2_s0"] = lambda: timm_model("efficientformerv2_s0", 224)
    hiera: dict[str, Any] = {"embed_dim": 16, "stages": (1, 2, 2, 1), "num_classes": 10, "drop_path_rate": 0.1}
    table["hiera"] = lambda: (_timm("hiera").Hiera((64, 64), **hiera), (images(),), {})
    table["convmixer"] = lambda: (_timm("convmixer").ConvMixer(32, 6, num_classes=10), (images(),), {})
    return table


def _timm(module: str) -> Any:
    shim()
    return importlib.import_module(f"timm.models.{module}")


def _torch_geometric() -> dict[str, Factory]:
    table: dict[str, Factory] = {
        name.lower(): partial(graph_network, name) for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN")
    }
    table["gcn-jumping"] = lambda: graph_network("GCN", jk="cat", norm="batch_norm", dropout=0.2)
    table["gat-v2"] = lambda: graph_network("GAT", v2=True, heads=2)
    table["graph-unet"] = _graph_unet
    table["schnet"] = _schnet
    return table


def _graph_unet() -> Example:
    models = importlib.import_module("torch_geometric.nn.models")
    return models.GraphUNet(8, 16, 4, depth=2), (torch.randn(20, 8), torch.randint(0, 20, (2, 80))), {}


def _schnet() -> Example:
    models = importlib.import_module("torch_geometric.nn.models")
    model = models.SchNet(16, 16, 2, 8, interaction_graph=_all_pairs)
    return model, (torch.randint(1, 9, (12,)), torch.randn(12, 3), torch.tensor([0] * 6 + [1] * 6)), {}


def _all_pairs(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    apart = ~torch.eye(len(positions), dtype=torch.bool)
    edges = (apart & (batch[:, None] == batch[None, :])).nonzero().t()
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)


def _torch_own() -> dict[str, Factory]:
    return {
        "transformer": lambda: (
            nn.Transformer(16, 4, 2, 2, 32, batch_first=True),
            (torch.randn(2, 7, 16), torch.randn(2, 5, 16)),
            {},
        ),
        "encoder": lambda: (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 3),
            (torch.randn(7, 2, 16),),
            {},
        ),
    }


FAMILIES: Mapping[str, Callable[[], Mapping[str, Factory]]] = {
    **HARD,
    "torch": _torch_own,
    "torchvision": _torchvision,
    "torchvision tasks": _segmentation_and_detection,
    "timm convolutional": _timm_convolutional,
    "timm attention": _timm_attention,
    "transformers text": _transformers_text,
    "transformers sequence to sequence": _sequence_to_sequence,
    "transformers vision": _transformers_vision,
    "transformers other": _transformers_other,
    "torch-geometric": _torch_geometric,
}
"""Families of models; a family's table names each model's factory, which returns (model, args, kwargs)."""
