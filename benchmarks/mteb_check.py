"""真的用 mteb 跑我们的编码器：两个离线的任务，图文检索（玩具店）和 STS，和本库自己的指标对一对。
mteb 不要求 torchvision，但依赖多，放在自己的环境里（bash）：
  python3.11 -m venv .venv-mteb && .venv-mteb/bin/pip install -c constraints.txt torch mteb==2.26.24 pillow rapidfuzz loky pyyaml matplotlib peft && .venv-mteb/bin/pip install --no-deps -e .
  .venv-mteb/bin/python benchmarks/mteb_check.py"""
import os
import tempfile
from pathlib import Path

os.environ.setdefault("VEMBED_PROGRESS", "0")
os.environ.setdefault("TQDM_DISABLE", "1")
import mteb
import torch
from datasets import Dataset, DatasetDict, Image
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.models_protocols import EncoderProtocol
from scipy.stats import spearmanr

from vembed_nb.core import versions, write_json
from vembed_nb.data.read import read_corpus, read_records
from vembed_nb.evaluate.report import evaluate_encoder
from vembed_nb.models.load import load_encoder
from vembed_nb.ship.wrap import MTEBEncoder
from vembed_nb.toyshop import write_toyshop

ROOT = Path(__file__).resolve().parents[1]
FACTS = dict(description="玩具店", reference="https://example.org", dataset=dict(path="NA", revision="NA"), eval_splits=["test"], eval_langs=["zho-Hans"], date=("2026-01-01", "2026-01-01"), dialect=[], domains=[],
             task_subtypes=[], license="mit", annotations_creators="derived", sample_creation="created", bibtex_citation="")


def retrieval(records, corpus, root):
    "文搜图：mteb 的任务。"
    ids, items, _ = corpus

    class ToyShop(AbsTaskRetrieval):
        metadata = TaskMetadata(type="Any2AnyRetrieval", name="VembedToyShop", main_score="ndcg_at_10", category="t2i", modalities=["text", "image"], **FACTS)

        def load_data(self, num_proc=None, **kwargs):
            pictures = Dataset.from_dict({"id": ids, "image": [str(root/i.image) for i in items]}).cast_column("image", Image())
            queries = Dataset.from_dict({"id": [f"q{n}" for n in range(len(records))], "text": [r.query.text for r in records]})
            self.dataset = {"default": {"test": RetrievalSplitData(queries=queries, corpus=pictures, relevant_docs={f"q{n}": {p: 1 for p in r.positive_ids} for n, r in enumerate(records)}, top_ranked=None)}}
            self.data_loaded = True
    return ToyShop()


PAIRS = [("红色的杯子", "红色的杯", 5), ("红色的杯子", "a red mug", 5), ("红色的杯子", "蓝色的杯子", 3), ("红色的杯子", "蓝色的碗", 1), ("a red mug", "a red bowl", 3), ("黄色的椅子", "黄色的凳子", 3), ("黄色的椅子", "绿色的鞋", 0), ("带条纹的包", "striped bag", 5)]


class ToySTS(AbsTaskSTS):
    metadata = TaskMetadata(type="STS", name="VembedToySTS", main_score="cosine_spearman", category="t2t", modalities=["text"], **FACTS)
    min_score, max_score = 0, 5

    def load_data(self, num_proc=None, **kwargs):
        a, b, s = zip(*PAIRS)
        self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(dict(sentence1=a, sentence2=b, score=s))), True


def main():
    encoder = load_encoder("tiny-clip")
    wrapped = MTEBEncoder(encoder, "vembed-nb/tiny-clip")
    assert isinstance(wrapped, EncoderProtocol)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        write_toyshop(root, n_train=10, n_val=10, n_test=200, n_queries=100, world="A", seed=3, workers=1)
        records, corpus = read_records(root/"test.jsonl"), read_corpus(root/"corpus.jsonl")
        ours = evaluate_encoder(encoder, records, corpus, str(root))
        results = mteb.evaluate(wrapped, [retrieval(records, corpus, root), ToySTS()], cache=None, co2_tracker=False, show_progress_bar=False)
    theirs = {r.task_name: r.scores["test"][0] for r in results.task_results}
    shop, sts = theirs["VembedToyShop"], theirs["VembedToySTS"]
    v = encoder.encode([t for a, b, _ in PAIRS for t in (a, b)]).view(len(PAIRS), 2, -1)
    mine = spearmanr((v[:, 0] * v[:, 1]).sum(-1), [s for *_, s in PAIRS]).statistic
    rows = dict(retrieval=dict(mteb={k: shop[k] for k in ("ndcg_at_10", "recall_at_1", "recall_at_10", "hit_rate_at_1") if k in shop}, ours={k: ours.metrics[k] for k in ("ndcg@10", "recall@1", "recall@10", "hit@1")}, n_queries=ours.n_queries, n_corpus=ours.n_corpus),
                sts=dict(mteb=dict(cosine_spearman=sts["cosine_spearman"]), ours=dict(cosine_spearman=float(mine)), n_pairs=len(PAIRS)))
    assert abs(shop["ndcg_at_10"] - ours.metrics["ndcg@10"]) < 1e-4 and abs(shop["recall_at_10"] - ours.metrics["recall@10"]) < 1e-4 and abs(sts["cosine_spearman"] - mine) < 1e-4, rows
    write_json(ROOT/"assets/results/mteb_check.json", dict(model="tiny-clip", rows=rows, versions=versions(["mteb", "torch", "transformers", "datasets"])))
    print(rows)


if __name__ == "__main__": main()
