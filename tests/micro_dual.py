"""造一个随机的微型双塔，给测试用：每种 model_type 都配它真正的分词器类（词表很小）。"""
import torch

KINDS = ("clip", "metaclip_2", "chinese_clip", "siglip", "siglip2")
LENGTH = 32


def gemma(cls, **options):
    "Gemma 式的分词器：一个字母一个 token，别的拆成字节，句尾加 eos。"
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789", *(f"<0x{b:02X}>" for b in range(256))]
    return cls(vocab={w: i for i, w in enumerate(words)}, merges=[], add_bos_token=False, add_eos_token=True, padding_side="right", model_max_length=LENGTH, **options)


def tokenizer(kind):
    "一种 model_type 真正用的分词器；clip 和 siglip 用本库的小分词器。"
    import transformers as tf

    from vembed_nb.pretrain import build_tokenizer, level1_hanzi

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.!?，。"]
    if kind == "metaclip_2":  # XLM-R：bos 0、pad 1、eos 2
        return tf.XLMRobertaTokenizer(vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in letters + level1_hanzi())], model_max_length=LENGTH)
    if kind == "chinese_clip":  # BERT：变小写，汉字单列
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *level1_hanzi()]
        return tf.BertTokenizer(vocab={w: i for i, w in enumerate(words)}, model_max_length=512)
    if kind == "siglip2": return gemma(tf.Siglip2Tokenizer)
    return build_tokenizer(["红色的杯子 a red cup"], vocab_size=4200)


def encoder(kind="clip", seed=0, hidden=16, layers=1, image=32, patch=8, tok=None, **text):
    "一个随机的 DualEncoder；text 里的值改文字塔的配置。"
    import transformers as tf

    from vembed_nb.models.base import quiet
    from vembed_nb.models.dual import DualEncoder

    name = {"clip": "CLIP", "metaclip_2": "MetaClip2", "chinese_clip": "ChineseCLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    with quiet():
        tok = tok or tokenizer(kind)
        size = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2)
        words = dict(size, vocab_size=len(tok), max_position_embeddings=64 if kind == "chinese_clip" else LENGTH, pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
        if kind == "chinese_clip": words |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        vision, pictures = dict(size, image_size=image, patch_size=patch), {"size": {"height": image, "width": image}}
        if kind == "siglip2": vision, pictures = vision | {"num_patches": (image // patch) ** 2}, dict(patch_size=patch, max_num_patches=(image // patch) ** 2)
        if "clip" in kind: words, pictures = words | {"projection_dim": hidden}, {"size": {"shortest_edge": image}, "crop_size": {"height": image, "width": image}}
        config = getattr(tf, name + "Config")(text_config=words | text, vision_config=vision, **({"projection_dim": hidden} if "clip" in kind else {}))
        torch.manual_seed(seed)
        model = getattr(tf, name + "Model")(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1: p.mul_(0.25 / p.std())  # 初始的权重很小，不同的输入几乎是同一个向量，查不出错
        name = "CLIP" if kind == "metaclip_2" else name
        return DualEncoder(model, getattr(tf, name + "Processor")(getattr(tf, name + "ImageProcessorPil")(**pictures), tok)).eval()


def build(folder, seed=0, kind="clip", **sizes):
    "存一个随机的微型模型，返回文件夹。"
    encoder(kind, seed, **sizes).save(folder)
    return folder
