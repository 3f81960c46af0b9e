"测试和 notebook 用的重排器：真的结构，随机的权重，不到 1 MB。"
import json
from pathlib import Path

import torch
import transformers as tf

from vembed_nb.core import write_json
from vembed_nb.models.base import quiet
from vembed_nb.models.reranker import Reranker
from vembed_nb.models.vlm import add_chat_tokens
from vembed_nb.pretrain import build_tokenizer

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def make_tokenizer(max_length=512):
    "会聊天格式、有 yes 和 no 的小分词器。"
    from tokenizers import AddedToken, processors

    tok = add_chat_tokens(build_tokenizer(["红色的杯子 a red cup"], 4200, max_length))
    tok.add_tokens([AddedToken("yes", single_word=True), AddedToken("no", single_word=True)])
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 1), ("<eos>", 3)])
    return tok


def vl_config(kind, tok, **sizes):
    "一个很小的 Qwen2-VL、Qwen2.5-VL 或 Qwen3-VL 的配置。"
    names = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    text = dict(SMALL, vocab_size=len(tok), num_key_value_heads=1, max_position_embeddings=512, rope_parameters=dict(rope_type="default", rope_theta=10000., mrope_section=[4, 2, 2]), **sizes)
    vision = dict(patch_size=8, temporal_patch_size=2, spatial_merge_size=2)
    if kind == "qwen3_vl":
        text.update(head_dim=16)
        vision.update(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0])
    elif kind == "qwen2_5_vl": vision.update(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, window_size=32, fullatt_block_indexes=[1])
    else: vision.update(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
    cls = dict(qwen3_vl=tf.Qwen3VLConfig, qwen2_5_vl=tf.Qwen2_5_VLConfig, qwen2_vl=tf.Qwen2VLConfig)[kind]
    return cls(text_config=text, vision_config=vision, tie_word_embeddings=True, **{k: tok.convert_tokens_to_ids(v) for k, v in names.items()})


def build(folder, seed=0, kind="qwen3_vl", form="", **sizes):
    "存一个随机的重排器：kind 是 model_type，form 是 yes_no 或 head（空着用默认的）；返回 folder。"
    torch.manual_seed(seed)
    tok, processor, head = make_tokenizer(), None, None
    if kind.endswith("_vl"):
        config = vl_config(kind, tok, **sizes)
        names = dict(qwen3_vl="Qwen3VL", qwen2_5_vl="Qwen2_5_VL", qwen2_vl="Qwen2VL")
        model = getattr(tf, names[kind] + ("Model" if form == "head" else "ForConditionalGeneration"))(config)
        head = torch.nn.Linear(32, 1) if form == "head" else None
        processor = tf.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 64 * 64})
    elif kind == "qwen3":
        config = tf.Qwen3Config(**{**SMALL, **sizes}, num_key_value_heads=1, head_dim=16, vocab_size=len(tok), max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, num_labels=1)
        model = (tf.Qwen3ForSequenceClassification if form == "head" else tf.Qwen3ForCausalLM)(config)
    else:
        tok.chat_template = None
        tok.model_input_names = ["input_ids", "token_type_ids", "attention_mask"][::1 if kind == "bert" else 2]
        config = dict(bert=tf.BertConfig, roberta=tf.RobertaConfig)[kind](**{**SMALL, **sizes}, vocab_size=len(tok), max_position_embeddings=512 if kind == "bert" else 514, pad_token_id=0, num_labels=1)
        model = dict(bert=tf.BertForSequenceClassification, roberta=tf.RobertaForSequenceClassification)[kind](config)
    with quiet(): Reranker(model.eval(), tok, processor, head=head).save(folder)
    if kind == "bert": write_json(Path(folder)/"tokenizer_config.json", {**json.loads((Path(folder)/"tokenizer_config.json").read_text()), "model_input_names": tok.model_input_names})  # save_pretrained 不存它
    return folder
