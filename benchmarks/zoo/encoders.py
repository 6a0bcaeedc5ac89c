"""Text encoders, bare or with a head."""

from typing import Any

from benchmarks.zoo.subjects import TINY, Inputs, Subject, add, masked, pretrained, tokens

FAMILY = "encoders"

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model": "BertModel"},
    "bert-masked-lm": {"model": "BertForMaskedLM", "config": "BertConfig"},
    "bert-classifier": {"model": "BertForSequenceClassification", "config": "BertConfig"},
    "roberta": {"model": "RobertaForMaskedLM", "config": "RobertaConfig"},
    "distilbert": {"model": "DistilBertModel", "dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 96},
    "modernbert": {"model": "ModernBertForMaskedLM", "config": "ModernBertConfig", "local_attention": 8,
                   "global_attn_every_n_layers": 2, "num_hidden_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    "deberta": {"model": "DebertaModel", "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"model": "DebertaV2Model", "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                   "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "electra": {"model": "ElectraModel", "embedding_size": 32},
    "albert": {"model": "AlbertModel", "embedding_size": 32},
    "xlm-roberta": {"model": "XLMRobertaModel"},
    "mpnet": {"model": "MPNetModel"},
    "convbert": {"model": "ConvBertModel", "embedding_size": 64},
    "squeezebert": {"model": "SqueezeBertModel", "embedding_size": 64},
    "roformer": {"model": "RoFormerModel", "embedding_size": 64},
    "fnet": {"model": "FNetModel", "inputs": tokens},
    "funnel": {"model": "FunnelModel", "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16,
               "d_inner": 96, "num_decoder_layers": 1, "num_hidden_layers": None},
    "mobilebert": {"model": "MobileBertModel", "embedding_size": 32, "intra_bottleneck_size": 32},
    "xlnet": {"model": "XLNetModel", "d_model": 64, "n_layer": 1, "n_head": 4, "d_inner": 96,
              "max_position_embeddings": None},
    "longformer": {"model": "LongformerModel", "attention_window": 4},
    "big-bird": {"model": "BigBirdModel", "attention_type": "original_full"},
    "nystromformer": {"model": "NystromformerModel", "num_landmarks": 4, "segment_means_seq_len": 4},
    "xlm": {"model": "XLMModel", "emb_dim": 64, "n_layers": 1, "n_heads": 4},
    "eurobert": {"model": "EuroBertModel"},
}  # fmt: skip


def encoder(model: str, config: str = "", inputs: Inputs = masked, **changes: Any) -> Subject:
    """An encoder of transformers; `XModel` has an `XConfig`."""
    return pretrained(
        model, config or model.removesuffix("Model") + "Config", **{**TINY, "num_hidden_layers": 1, **changes}
    ), inputs


for _name, _options in ENCODERS.items():
    add(FAMILY, _name, lambda options=_options: encoder(**options))  # type: ignore[misc]
