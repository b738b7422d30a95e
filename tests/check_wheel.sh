#!/usr/bin/env bash
# Builds the sdist and from it the wheel, installs the wheel into an empty environment, and there, far from the
# checkout, runs the command line and a tiny pipeline. Needs a Python with `build`: by default .venv's.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VIRTUAL_ENV

"$python" -m build --outdir "$work/dist" "$root"
wheel=$(echo "$work"/dist/*.whl)

echo "what the wheel holds"
"$python" - "$wheel" "$root" <<'PYTHON'
import sys, zipfile
from pathlib import Path

wheel, root = zipfile.ZipFile(sys.argv[1]), Path(sys.argv[2])
held = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
code = {str(path.relative_to(root)) for path in (root / "softlabels").rglob("*.py")}
recipes = {f"softlabels/{path.relative_to(root)}" for path in (root / "pipeline").rglob("*") if path.is_file()}
assert recipes, "pipeline/ is empty"
assert code | recipes <= held, f"not in the wheel: {sorted((code | recipes) - held)}"
page = {f"softlabels/report/page.{part}" for part in ("html.j2", "css", "js")}
assert page <= held, f"not in the wheel: {sorted(page - held)}"
foreign = {name for name in held - code - recipes - page if not name.endswith("py.typed")}
assert not foreign, f"in the wheel, but neither code, a recipe nor the page of report: {sorted(foreign)}"
print(f"{len(code)} modules, {len(recipes)} files of pipeline/")
PYTHON

echo "an empty environment"
"$python" -m venv "$work/env"
"$work/env/bin/python" -m pip --disable-pip-version-check install --quiet -c "$root/constraints.txt" "$wheel"

mkdir "$work/elsewhere"
cd "$work/elsewhere"
export HF_HUB_OFFLINE=1 HF_HOME="$work/hub" PATH="$work/env/bin:$PATH"
softlabels --help >/dev/null
softlabels --version
python -m softlabels run --help >/dev/null

echo "a tiny pipeline"
python - <<'PYTHON'
import json, random
from pathlib import Path

import softlabels
from softlabels.recipes import read_recipe
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

assert read_recipe("quickstart").students, "a shipped recipe is found by its name"
assert "elsewhere" not in softlabels.__file__ and "site-packages" in softlabels.__file__

good, bad = "fine warm lovely bright clever".split(), "dull cold awful grey stupid".split()
neutral = "the film was a long story about two people in some town".split()
pick = random.Random(0)
for name, count in {"train": 80, "test": 40}.items():
    lines = []
    for number in range(count):
        words = pick.choices(neutral, k=6) + pick.choices(bad if number % 2 else good, k=3)
        pick.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": ["good", "bad"][number % 2]}))
    Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n")

logging.disable_progress_bar()
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *good, *bad, *neutral])}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=32
)
set_seed(0)
config = BertConfig(
    vocab_size=words.get_vocab_size(), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=32, num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
)
BertForSequenceClassification(config).save_pretrained("pretrained")
tokenizer.save_pretrained("pretrained")

Path("tiny.yaml").write_text("""
name: tiny
corpus: {source: train.jsonl, test_source: test.jsonl}
teacher:
  model: ./pretrained
  train: {epochs: 10, lr: 5e-3, batch_size: 16}
dump: {capture: [logits, "hidden:1-2"]}
students:
  - {name: linear, student: linear, losses: {mse_logits: 1}}
  - {name: bilstm, student: bilstm, losses: {kl: 1}, temperature: "2", epochs: 2}
""")
PYTHON
softlabels run tiny.yaml --cpu
softlabels run tiny.yaml --cpu --json >again.json
softlabels info runs/tiny/cache
python - <<'PYTHON'
import json

result = json.load(open("again.json"))
assert [row["student"] for row in result["rows"]] == ["linear", "bilstm"], result
assert result["skipped"] >= 6, "the second time every stage is skipped"
PYTHON
echo "the wheel is fine"
