"""The README of a cache: a manifest and what is known of licences come in, a dataset card goes out.

The head is YAML as the Hugging Face Hub reads it; with its `configs` the Hub's viewer and `datasets.load_dataset` find
each field's files. The rest is Markdown for people. Names come from strangers' manifests: they stand as code spans, on
one line, so that none can be a link, a heading or HTML; folders of the machine that dumped, and what a URL may hold of
credentials, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from softlabels.cache.format import EXAMPLES, VERSION, FieldSpec, Manifest
from softlabels.cache.info import clipped_values, personal_data
from softlabels.cache.licence import HUB_LICENCES, CardFacts
from softlabels.cache.urls import split_credentials
from softlabels.errors import CacheError

MARK = "<!-- made by `softlabels card`; what is changed here is lost when it is made again -->"
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
_TASKS = {  # as manifests call them → as the Hub does
    "sequence-classification": "text-classification",
    "multi-label-classification": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "seq2seq-lm": "text-generation",
    "sentence-embedding": "sentence-similarity",
    "image-classification": "image-classification",
}
_LONGEST = 200  # characters of a name
_CLASSES = 50  # names of classes that are listed


def write_card(
    manifest: Manifest,
    facts: CardFacts | None = None,
    *,
    url: str | None = None,
    folder_of: Callable[[str], str] = lambda field: field,
) -> str:
    """The text of README.md for a finished cache; the same manifest and facts give the same text.

    `url` is where the cache lies for others (hf://…, s3://…, https://…); None where that isn't known; `folder_of` says
    where each field lies there. CacheError for an
    unfinished cache.
    """
    if not manifest.complete:
        raise CacheError("the cache is unfinished, and has no card yet: give the dump command that began it again")
    facts = facts or CardFacts()
    place = None if url is None else public_name(url)
    title = facts.name or f"What {public_name(manifest.teacher.name)} says of {public_name(manifest.corpus.source)}"
    parts = [
        f"# {code(facts.name)}" if facts.name else f"# {_title(manifest)}",
        MARK,
        _opening(manifest),
        "## Use\n\n" + _use(manifest, place),
        "## Licences\n\n" + _licences(facts),
        "## Personal data\n\n" + _personal(manifest),
        "## Teacher\n\n" + _list(_teacher(manifest)),
        "## Corpus\n\n" + _list(_corpus(manifest)),
        "## Fields\n\n" + _fields(manifest),
        "## Format\n\n" + _format(manifest),
    ]
    return f"---\n{_head(manifest, facts, title=title, folder_of=folder_of)}\n---\n\n" + "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------------- the head


def _head(manifest: Manifest, facts: CardFacts, *, title: str, folder_of: Callable[[str], str]) -> str:
    from huggingface_hub import DatasetCardData

    more: dict[str, Any] = {"tags": ["softlabels", "knowledge-distillation", "soft-labels"]}
    if facts.license is not None and facts.license.lower() not in HUB_LICENCES:
        more["license_name"] = re.sub(r"[^a-z0-9.]+", "-", facts.license.lower()).strip("-.") or "other"
    data = DatasetCardData(
        language=list(facts.language) or None,
        license=None if facts.license is None else _hub_licence(facts.license),
        annotations_creators=["machine-generated"],
        size_categories=[_size(manifest.corpus.rows)],
        task_categories=[_TASKS[manifest.teacher.task]],
        pretty_name=one_line(title),
        configs=[_config(name, folder_of(name)) for name in (EXAMPLES, *sorted(manifest.fields))],
        **more,
    )
    return data.to_yaml(line_break="\n")


def _hub_licence(text: str) -> str:
    return text.lower() if text.lower() in HUB_LICENCES else "other"


def _config(field: str, folder: str) -> dict[str, Any]:
    default = {"default": True} if field == EXAMPLES else {}
    return {"config_name": field, "data_files": [{"split": "train", "path": f"{folder}/*.arrow"}], **default}


def _size(rows: int) -> str:
    return next((size for power, size in enumerate(_SIZES, start=3) if rows < 10**power), "10B<n<100B")


# ----------------------------------------------------------------------------------------------------------- the rest


def _title(manifest: Manifest) -> str:
    return f"What {named(manifest.teacher.name)} says of {named(manifest.corpus.source)}"


def _opening(manifest: Manifest) -> str:
    return (
        f"What a teacher model for {manifest.teacher.task} said of {manifest.corpus.rows:,} "
        f"{'images' if manifest.teacher.task == 'image-classification' else 'texts'}, kept by softlabels so that "
        f"students can be trained from it without the teacher: {_bytes(_total(manifest))}."
    )


def _use(manifest: Manifest, place: str | None) -> str:
    field = "logits" if "logits" in manifest.fields else min(manifest.fields, default=EXAMPLES)
    lines = ["With softlabels:", ""]
    pull = [] if place is None else [f"softlabels pull {_word(place)} cache --field {field}"]
    commands = [*pull, "softlabels verify cache", "softlabels train-student cache --student bilstm --out runs/student"]
    lines += ["```", *commands, "```", "", "```python", "import softlabels", ""]
    lines += ['cache = softlabels.open_cache("cache")', f'for batch in cache.loader(range(len(cache)), ["{field}"]):']
    lines += ["    print(batch.tokens.input_ids.shape, batch.teacher)", "```", ""]
    repository = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)/?", place or "")
    named = f'"{repository[1]}"' if repository else '"cache"'
    lines += ["Without it, a field at a time, its rows in the order of `examples`:", "", "```python"]
    lines += ["import datasets", "", f'rows = datasets.load_dataset({named}, "{EXAMPLES}", split="train")']
    return "\n".join([*lines, f'said = datasets.load_dataset({named}, "{field}", split="train")', "```"])


def _licences(facts: CardFacts) -> str:
    unknown = "not stated: ask who made it before you use it"
    told = {
        "this cache": facts.license,
        "the teacher": facts.teacher_license,
        "the corpus": facts.corpus_license,
    }
    return _list({what: unknown if text is None else code(text) for what, text in told.items()}) + (
        "\n\nWhat a model says of texts may be bound by the terms of both: of the model's for its outputs, and of the "
        "texts'."
    )


def _personal(manifest: Manifest) -> str:
    lines = "\n".join(f"- {line}" for line in personal_data(manifest))
    return f"Nobody has looked for personal data in it. By what it holds it may carry some in:\n\n{lines}"


def _teacher(manifest: Manifest) -> dict[str, str]:
    card = manifest.teacher
    facts = {"name": named(card.name), "made for": card.task, "hash of weights and config": code(card.weights_hash)}
    if card.label_names:
        more = "" if len(card.label_names) <= _CLASSES else f" and {len(card.label_names) - _CLASSES} more"
        facts["classes"] = ", ".join(code(label) for label in card.label_names[:_CLASSES]) + more
    if manifest.combined is not None:
        facts["made of"] = ", ".join(named(part.teacher) for part in manifest.combined.caches[:_CLASSES])
        facts["how"] = manifest.combined.choose or manifest.combined.how
    return facts | {"computed in": code(manifest.dump.dtype), "hash of the tokenizer": code(manifest.tokenizer_hash)}


def _corpus(manifest: Manifest) -> dict[str, str]:
    card = manifest.corpus
    facts = {"source": named(card.source)} | ({} if card.split is None else {"split": code(card.split)})
    facts |= {
        "rows": f"{card.rows:,}, {card.labelled:,} of them labelled",
        "tokens": f"{sum(manifest.shard_tokens):,}",
        "cut": f"{card.truncated:,} rows to {manifest.dump.max_length:,} tokens",
        "hash of ids, texts and labels": code(card.hash),
    }
    if (masking := manifest.dump.masking) is not None:
        rare = f", rare ones more often (count^-{masking.smoothing:g})" if masking.smoothing else ""
        every = "; the teacher speaks of all" if masking.targets == "all" else ""
        facts["masked"] = f"{100 * masking.rate:g} % of the tokens, each text {masking.times} time(s){rare}{every}"
    return facts


def _fields(manifest: Manifest) -> str:
    clipped = clipped_values(manifest)
    lines = ["| field | one for each | values | stored as | size |", "|---|---|---|---|---:|"]
    lines.append(f"| `{EXAMPLES}` | row | {_columns(manifest)} | | {_bytes(manifest.shards[EXAMPLES].total)} |")
    for field, spec in sorted(manifest.fields.items()):
        note = f", {clipped[field]:,} values clipped" if field in clipped else ""
        size = _bytes(manifest.shards[field].total)
        lines.append(f"| `{field}` | {_kind(spec)} | {_shape(spec)} | {spec.type}{note} | {size} |")
    return "\n".join(lines)


def _columns(manifest: Manifest) -> str:
    texts = ", texts" if manifest.dump.text else ", no texts"
    return "ids, hashes, labels" if manifest.teacher.task == "image-classification" else f"ids, tokens, labels{texts}"


def _kind(spec: FieldSpec) -> str:
    return {"row": "row", "token": "token", "pair": "pair of tokens", "target": "token to be predicted"}[spec.kind]


def _shape(spec: FieldSpec) -> str:
    heads = "" if spec.heads is None else f" ({spec.heads} heads)"
    form = "" if spec.form is None else f", {code(spec.form.replace('|', ' '))}"  # a bar would end the cell
    return f"{spec.width:,}{heads}{form}"


def _format(manifest: Manifest) -> str:
    versions = ", ".join(f"{code(key)} {code(value)}" for key, value in sorted(manifest.versions.items())[:20])
    count, most = len(manifest.shard_rows), manifest.dump.shard_rows
    return (
        f"softlabels-cache, version {VERSION}: a folder of Arrow IPC files for each field, {count:,} file(s) of up to "
        f"{most:,} rows, nothing padded, no pickle; `manifest.json` has a hash of each. bfloat16 is kept as uint16, "
        f"and int8 with a column of scales. Written with {versions}."
    )


# ------------------------------------------------------------------------------------------------- words of strangers


def public_name(text: str) -> str:
    """A source's or teacher's name without the folders of a machine, and a URL without its credentials."""
    return one_line(_public(_printable(text)))  # cut last: a credential must not lose the @ that tells it


def _public(text: str) -> str:
    if " + " in text:  # of several
        return " + ".join(dict.fromkeys(_public(part) for part in text.split(" + ")))
    if "://" in text:
        scheme, name, rest = split_credentials(text)
        user = f"{name}@" if name is not None and ":" not in name and scheme in ("sftp", "ssh") else ""
        return f"{scheme}://{user}{re.split('[?#]', rest)[0]}"  # what follows a ? may be a signature
    path = PurePosixPath(text.replace("\\", "/"))
    private = text.startswith(("/", "~", "\\")) or ".." in path.parts or re.match(r"[A-Za-z]:[\\/]", text)
    return (path.name or "a folder") if private else text


def one_line(text: str) -> str:
    """Printable, on one line, and not endless."""
    text = _printable(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _printable(text: str) -> str:
    text = "".join(sign if sign.isprintable() else " " for sign in text)  # also what turns the direction of writing
    return " ".join(text.split())


def code(text: str) -> str:
    """`text` as it is, as a code span: nothing in it means anything to Markdown or HTML."""
    text = one_line(text) or "–"
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def named(text: str) -> str:
    """A source or teacher, as it may be told to everyone."""
    return code(public_name(text))


def _word(text: str) -> str:
    """One word of a shell's command line, within a fenced block."""
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text) else "'" + re.sub(r"['`]", "", text) + "'"


def _list(facts: dict[str, str]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _total(manifest: Manifest) -> int:
    return sum(table.total for table in manifest.shards.values())
