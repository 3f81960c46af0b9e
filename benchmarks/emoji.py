"真实图片上的微调：在表情符号的训练概念上微调 tiny-clip，在没见过的概念上评测，写 assets/results/emoji.json。用法：python benchmarks/emoji.py EMOJI_DIR"
import json
import sys
import tempfile
from pathlib import Path

from vembed_nb.core import machine, versions
from vembed_nb.data.read import read_corpus, read_records
from vembed_nb.evaluate.report import SHOWN, evaluate_encoder
from vembed_nb.models.load import load_encoder
from vembed_nb.show.gallery import gallery
from vembed_nb.search.searcher import Searcher, build_index
from vembed_nb.quickstart import gallery_rows
from vembed_nb.train.trainer import Trainer

root = Path(__file__).parent.parent
CONFIG = dict(epochs=2, batch_size=128, learning_rate=3e-4, warmup_ratio=0.05)


def main(emoji, seed=42):
    emoji = Path(emoji)
    test, corpus = read_records(emoji/"test.jsonl"), read_corpus(emoji/"corpus.jsonl")
    score = lambda enc: {"all": evaluate_encoder(enc, test, corpus, emoji), **{lang: evaluate_encoder(enc, [r for r in test if r.query_id.startswith(lang)], corpus, emoji) for lang in ("zh", "en")}}
    start = load_encoder("tiny-clip")
    before = score(start)
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer("tiny-clip", **CONFIG, seed=seed)
        history = trainer.train(emoji/"train.jsonl", val_data_path=str(emoji/"val.jsonl"), output_dir=out, overwrite=True)
        encoder = load_encoder(out)
        after = score(encoder)
        rows = gallery_rows(test, {"微调前": Searcher(build_index(start, corpus, emoji), start, str(emoji)), "微调后": Searcher(build_index(encoder, corpus, emoji), encoder, str(emoji))}, seed)
        gallery(rows, emoji, root/"assets/img/emoji_gallery.png", title="没见过的表情概念")
    pick = lambda reports: {k: {m: r.metrics[m] for m in SHOWN} | {"ci_hit@1": r.ci["hit@1"], "ci_hit@10": r.ci["hit@10"], "n_queries": r.n_queries, "n_corpus": r.n_corpus} for k, r in reports.items()}
    result = dict(seed=seed, chance_hit1=1 / len(corpus[0]), before=pick(before), after=pick(after), config=CONFIG, steps=trainer.step, seconds=history[-2].get("seconds"), machine=machine(), versions=versions())
    (root/"assets/results/emoji.json").write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: {s: round(result[k]["all"][s], 3) for s in ("hit@1", "hit@10")} for k in ("before", "after")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
