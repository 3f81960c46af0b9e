"拼装家族的微型模型：随机的权重，几百 KB，一层。"
from vembed_nb.models.composed import ComposedEncoder, ImageTower, TextTower, Towers, head_spec
from vembed_nb.models.parts import VERSIONS, square_processor, width

SIZE = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
BERT = dict(SIZE, intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
VIT = dict(SIZE, image_size=32, patch_size=16)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=3)
TEXTS = {  # model_type → (配置类, 参数)
    "bert": ("BertConfig", dict(BERT, max_position_embeddings=32)),
    "ernie": ("ErnieConfig", dict(BERT, max_position_embeddings=32)),
    "albert": ("AlbertConfig", dict(BERT, embedding_size=16, max_position_embeddings=32)),
    "electra": ("ElectraConfig", dict(BERT, embedding_size=16, max_position_embeddings=32)),
    "distilbert": ("DistilBertConfig", dict(dim=16, hidden_dim=32, n_layers=1, n_heads=2, dropout=0.0, attention_dropout=0.0, max_position_embeddings=32)),
    "roberta": ("RobertaConfig", dict(BERT, max_position_embeddings=40)),
    "xlm-roberta": ("XLMRobertaConfig", dict(BERT, max_position_embeddings=40)),
    "camembert": ("CamembertConfig", dict(BERT, max_position_embeddings=40)),
    "mpnet": ("MPNetConfig", dict(BERT, max_position_embeddings=40)),
    "modernbert": ("ModernBertConfig", dict(SIZE, intermediate_size=32, max_position_embeddings=32, cls_token_id=1, sep_token_id=3, global_attn_every_n_layers=1)),
    "nomic_bert": ("NomicBertConfig", dict(BERT, max_position_embeddings=32)),
    "eurobert": ("EuroBertConfig", dict(SIZE, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=32)),
    "qwen2": ("Qwen2Config", dict(SIZE, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=32)),
    "qwen3": ("Qwen3Config", dict(SIZE, intermediate_size=32, num_key_value_heads=1, head_dim=8, max_position_embeddings=32)),
    "llama": ("LlamaConfig", dict(SIZE, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=32)),
    "mistral": ("MistralConfig", dict(SIZE, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=32)),
    "gemma": ("GemmaConfig", dict(SIZE, intermediate_size=32, num_key_value_heads=1, head_dim=8, max_position_embeddings=32)),
    "gemma3_text": ("Gemma3TextConfig", dict(SIZE, intermediate_size=32, num_key_value_heads=1, head_dim=8, max_position_embeddings=32)),
}
SWIN = dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
IMAGES = {
    "dinov2": ("Dinov2Config", dict(VIT, mlp_ratio=2)),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", dict(VIT, mlp_ratio=2, num_register_tokens=2)),
    "dinov3_vit": ("DINOv3ViTConfig", dict(VIT, intermediate_size=32, num_register_tokens=2)),
    "dinov3_convnext": ("DINOv3ConvNextConfig", dict(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], image_size=32)),
    "vit": ("ViTConfig", dict(VIT, intermediate_size=32)),
    "vit_msn": ("ViTMSNConfig", dict(VIT, intermediate_size=32)),
    "vit_mae": ("ViTMAEConfig", dict(VIT, intermediate_size=32, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32)),
    "deit": ("DeiTConfig", dict(VIT, intermediate_size=32)),
    "beit": ("BeitConfig", dict(VIT, intermediate_size=32)),
    "swin": ("SwinConfig", SWIN),
    "convnext": ("ConvNextConfig", dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)),
    "convnextv2": ("ConvNextV2Config", dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)),
    "resnet": ("ResNetConfig", dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "siglip_vision_model": ("SiglipVisionConfig", dict(VIT, intermediate_size=32)),
    "clip_vision_model": ("CLIPVisionConfig", dict(VIT, intermediate_size=32)),
}


def backbone(kind, **changes):
    "一个随机的骨干。"
    import transformers as tf

    name, sizes = {**TEXTS, **IMAGES}[kind]
    ids = dict(IDS, vocab_size=4200) if kind in TEXTS else {}
    return tf.AutoModel.from_config(getattr(tf, name)(**{**ids, **sizes, **changes}))


def tokenizer(max_length=32):
    from vembed_nb.pretrain import build_tokenizer

    return build_tokenizer(["红色的杯子 a red cup"], vocab_size=4200, max_length=max_length)


def make(text="bert", image="dinov2", seed=0, dim=16, text_pooling="", image_pooling="", head="linear", freeze=()):
    "一个随机的编码器；text、image 空着就没有那座塔。"
    import torch

    torch.manual_seed(seed)
    towers = {}
    for name, kind, pooling, cls in (("text", text, text_pooling, TextTower), ("image", image, image_pooling, ImageTower)):
        if not kind: continue
        model = backbone(kind)
        if kind == "vit_mae": model.config.mask_ratio = 0.0
        towers[name] = cls(model, pooling or VERSIONS[kind]["pooling"], head_spec(head, width(model.config), dim))
    return ComposedEncoder(Towers(**towers), tokenizer() if text else None, square_processor(32) if image else None, freeze=freeze).eval()


def build(folder, seed=0, **sizes):
    "存一个随机的编码器，返回文件夹。"
    make(seed=seed, **sizes).save(folder)
    return folder


def build_text(folder, seed=0, kind="bert"):
    "只有文字塔、没有投影头：平的文件夹。"
    return build(folder, seed, text=kind, image="", head="none")


def build_image(folder, seed=0, kind="dinov2"):
    "只有图像塔、没有投影头：平的文件夹。"
    return build(folder, seed, text="", image=kind, head="none")
