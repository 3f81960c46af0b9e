"""造一个随机的晚交互微型模型：真的类、真的处理器，只是很小。"""
import torch
from vembed_nb.models.base import quiet
from vembed_nb.models.late import LateEncoder, col_idefics3
from vembed_nb.pretrain import build_tokenizer

SPECIAL = {"colpali": ["<image>"], "colqwen2": ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>"],
           "colmodernvbert": ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|begin_of_text|>", *(f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6))]}
SPECIAL["colsmol"] = ["<|im_start|>", *SPECIAL["colmodernvbert"]]
TEXT = dict(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=4096)


def tokenizer(kind, longest=256):
    "小分词器，加上这个版本的特殊 token；首尾不自动加 token。"
    from tokenizers import processors
    tok = build_tokenizer(["红色的杯子 a red cup"], vocab_size=4200, max_length=longest)
    tok.add_special_tokens({"additional_special_tokens": SPECIAL["colqwen2" if kind == "colqwen2.5" else kind]})
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    if kind.startswith("colqwen2"): tok.pad_token = "<|endoftext|>"  # 与真的 Qwen2-VL 一样：补齐和查询扩充用同一个 token
    return tok


def colqwen2(tok, h, dim, full, vlm="qwen2_vl"):
    from transformers import ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor, Qwen2VLImageProcessorPil
    ids = tok.convert_tokens_to_ids
    text = dict(TEXT, vocab_size=len(tok), hidden_size=h, num_key_value_heads=1, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, h // 4 - 2]), pad_token_id=tok.pad_token_id)
    patch, most = (14, 768 * 28 * 28) if full else (4, 2048)
    vision = dict(depth=2, num_heads=2, patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    vision |= dict(embed_dim=16, hidden_size=h, mlp_ratio=2) if vlm == "qwen2_vl" else dict(hidden_size=16, out_hidden_size=h, intermediate_size=32, window_size=16, fullatt_block_indexes=[1])
    config = ColQwen2Config(vlm_config=dict(model_type=vlm, text_config=text, vision_config=vision, image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"), vision_start_token_id=ids("<|vision_start|>"),
                                            vision_end_token_id=ids("<|vision_end|>")), embedding_dim=dim)
    return ColQwen2ForRetrieval(config), ColQwen2Processor(Qwen2VLImageProcessorPil(patch_size=patch, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 4 * (2 * patch)**2, "longest_edge": most}), tok)


def colpali(tok, h, dim, full):
    from transformers import ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor, SiglipImageProcessorPil
    text = dict(TEXT, model_type="gemma", vocab_size=len(tok) + 1200, hidden_size=h, num_key_value_heads=1, head_dim=h // 2, pad_token_id=tok.pad_token_id)
    size, patch = (448, 14) if full else (32, 8)
    vision = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=patch, vision_use_head=False)
    config = ColPaliConfig(vlm_config=dict(model_type="paligemma", text_config=text, vision_config=vision, image_token_id=tok.convert_tokens_to_ids("<image>"), projection_dim=h, hidden_size=h), embedding_dim=dim)
    images = SiglipImageProcessorPil(size={"height": size, "width": size})
    images.image_seq_length = (size // patch)**2
    return ColPaliForRetrieval(config), ColPaliProcessor(images, tok)


def colmodernvbert(tok, h, dim, full):
    from transformers import ColModernVBertConfig, ColModernVBertForRetrieval, ColModernVBertProcessor, Idefics3ImageProcessorPil
    text = dict(TEXT, model_type="modernbert", vocab_size=len(tok), hidden_size=h, pad_token_id=tok.pad_token_id, local_attention=16, bos_token_id=1, eos_token_id=3, cls_token_id=1, sep_token_id=3)
    size, patch, shuffle = (512, 16, 4) if full else (32, 8, 2)
    vision = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=patch)
    config = ColModernVBertConfig(vlm_config=dict(model_type="modernvbert", text_config=text, vision_config=vision, image_token_id=tok.convert_tokens_to_ids("<image>"), pixel_shuffle_factor=shuffle), embedding_dim=dim)
    return ColModernVBertForRetrieval(config), ColModernVBertProcessor(Idefics3ImageProcessorPil(size={"longest_edge": (4 if full else 2) * size}, max_image_size={"longest_edge": size}), tok, image_seq_len=(size // patch // shuffle)**2)


def colsmol(tok, h, dim, full):
    from transformers import Idefics3Config, Idefics3ImageProcessorPil, Idefics3Processor
    text = dict(TEXT, model_type="llama", vocab_size=len(tok), hidden_size=h, num_key_value_heads=1, pad_token_id=tok.pad_token_id)
    size, patch, shuffle = (512, 16, 4) if full else (32, 8, 2)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=patch)
    own = {} if dim == 128 else dict(embedding_dim=dim)  # colpali-engine 固定 128 维，config.json 里没有这一项
    config = Idefics3Config(text_config=text, vision_config=vision, image_token_id=tok.convert_tokens_to_ids("<image>"), scale_factor=shuffle, pad_token_id=tok.pad_token_id, **own)
    return col_idefics3()(config), Idefics3Processor(Idefics3ImageProcessorPil(size={"longest_edge": (4 if full else 2) * size}, max_image_size={"longest_edge": size}), tok, image_seq_len=(size // patch // shuffle)**2)


def make(kind="colqwen2", seed=0, hidden=16, dim=8, full=False):
    "(模型, Processor)。`full`：图像处理器、小块和瓦片的大小与真的一样，只有层数和宽度是小的。"
    tok = tokenizer(kind, 4096 if full else 256)
    torch.manual_seed(seed)
    with quiet():
        if kind == "colpali": out = colpali(tok, hidden, dim, full)
        elif kind == "colmodernvbert": out = colmodernvbert(tok, hidden, dim, full)
        elif kind == "colsmol": out = colsmol(tok, hidden, dim, full)
        else: out = colqwen2(tok, hidden, dim, full, "qwen2_5_vl" if kind == "colqwen2.5" else "qwen2_vl")
    for name, p in out[0].named_parameters():  # 默认的初始化（0.02）让注意力几乎均匀，看不出位置和掩码的错
        if p.ndim > 1: torch.nn.init.normal_(p, std=0.3)
    return out[0].eval(), out[1]


def engine(folder, kind="colqwen2", seed=0, dim=8, old=False):
    "同一个微型 ColQwen2，存成 colpali-engine 的格式；`old`：transformers 4.52 以前的参数名。返回 (文件夹, 模型, Processor)。"
    from copy import deepcopy

    from safetensors.torch import save_file
    model, processor = make(kind, seed, dim=dim)
    config = deepcopy(model.config.vlm_config)
    config.architectures, config.embedding_dim = ["ColQwen2_5" if kind == "colqwen2.5" else "ColQwen2"], dim
    with quiet():
        for part in (config, processor.image_processor, processor.tokenizer): part.save_pretrained(folder)
    rename = lambda k: k.removeprefix("vlm.").replace("embedding_proj_layer", "custom_text_proj").replace("language_model.", "model." if old else "language_model.")
    save_file({rename(k): v.contiguous() for k, v in model.state_dict().items()}, folder/"model.safetensors", metadata={"format": "pt"})
    return folder, model, processor


def build(folder, seed=0, kind="colqwen2", **sizes):
    "存一个微型模型，返回文件夹。"
    LateEncoder(*make(kind, seed, **sizes)).save(folder)
    return folder
