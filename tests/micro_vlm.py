"""造一个随机的微型 VLM（Qwen3-VL、Qwen2-VL、Qwen2.5-VL、LLaVA），给测试用。"""
import torch

SECTION = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def parts(model_type="qwen3_vl", seed=0, hidden=32, layers=2, vision_layers=2, patch=4, tokenizer=None):
    """(模型, 分词器, 图像处理器)，都是 transformers 的真类。"""
    import transformers as tf

    from vembed_nb.models.base import quiet
    from vembed_nb.models.vlm import add_chat_tokens
    from vembed_nb.pretrain import build_tokenizer
    with quiet():
        tok = tokenizer or add_chat_tokens(build_tokenizer(["红色的杯子 a red cup"], vocab_size=4200))
        at = tok.convert_tokens_to_ids
        ids = dict(image_token_id=at("<|image_pad|>"), video_token_id=at("<|video_pad|>"), vision_start_token_id=at("<|vision_start|>"), vision_end_token_id=at("<|vision_end|>"))
        text = dict(vocab_size=len(tok), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 8, num_key_value_heads=hidden // 16,
                    max_position_embeddings=512, bos_token_id=1, eos_token_id=3, pad_token_id=0)
        heads = max(1, hidden // 16)
        if model_type == "llava":
            config = tf.LlavaConfig(image_token_id=ids["image_token_id"], image_seq_length=16, vision_feature_layer=-1, vision_feature_select_strategy="default", text_config=tf.LlamaConfig(**text),
                                    vision_config=tf.CLIPVisionConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=vision_layers, num_attention_heads=heads, image_size=32, patch_size=8))
            torch.manual_seed(seed)
            return tf.LlavaModel(config).eval(), tok, tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        if model_type == "qwen3_vl":
            text |= dict(head_dim=8, rope_parameters={**SECTION, "mrope_interleaved": True})
            vision = dict(depth=vision_layers, hidden_size=hidden, intermediate_size=2 * hidden, num_heads=heads, patch_size=patch, spatial_merge_size=2, temporal_patch_size=2,
                          out_hidden_size=hidden, num_position_embeddings=64, deepstack_visual_indexes=[0])
            config, cls = tf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids), tf.Qwen3VLModel
        else:
            text |= dict(rope_parameters=SECTION)
            vision = dict(depth=vision_layers, patch_size=patch, spatial_merge_size=2, temporal_patch_size=2, num_heads=heads)
            if model_type == "qwen2_vl": vision |= dict(embed_dim=hidden, hidden_size=hidden, mlp_ratio=2)
            else: vision |= dict(hidden_size=hidden, out_hidden_size=hidden, intermediate_size=2 * hidden, window_size=4 * patch, fullatt_block_indexes=[vision_layers - 1])
            config_cls, cls = {"qwen2_vl": (tf.Qwen2VLConfig, tf.Qwen2VLModel), "qwen2_5_vl": (tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLModel)}[model_type]
            config = config_cls(text_config=text, vision_config=vision, **ids)
        torch.manual_seed(seed)
        model = cls(config).eval()
        side = 2 * patch
        images = tf.Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, min_pixels=4 * side * side, max_pixels=16 * side * side, image_mean=[.5] * 3, image_std=[.5] * 3)
    return model, tok, images


def encoder(model_type="qwen3_vl", seed=0, **options):
    """一个随机的微型 VLMEncoder；像素 256 到 1024，也就是 4 到 16 个 token。"""
    from vembed_nb.models.vlm import VLMEncoder
    sizes = {k: options.pop(k) for k in ("hidden", "layers", "vision_layers", "patch", "tokenizer") if k in options}
    model, tok, images = parts(model_type, seed, **sizes)
    budget = {} if model_type == "llava" else dict(min_pixels=16 * images.patch_size**2, max_pixels=64 * images.patch_size**2)
    options = budget | dict(max_length=200) | options
    return VLMEncoder(model, tok, images, **options).eval()


def build(folder, seed=0, model_type="qwen3_vl", **options):
    """存一个随机的微型 VLM（不到 1 MB），返回文件夹。"""
    encoder(model_type, seed, **options).save(folder)
    return folder
