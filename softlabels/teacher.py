"""The teacher: a model for any task, loaded as it is; or a classifier or language model that is trained here.

`load_teacher` gives a frozen model in eval mode, its tokenizer and its label names. `train_teacher` fine-tunes a
pretrained model, or trains a new one (see `scratch`): labelled rows, or for a language model any texts, in, a
`save_pretrained` folder out, with `teacher.json` saying how it came about. The folder is written under another name and
renamed last, so `out` is either a whole teacher or not there. The loop itself is in `fine_tuning`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from softlabels.cache.files import lock
from softlabels.cache.files import sync_folder as sync
from softlabels.corpus import Corpus, check_trainable, encode_labels
from softlabels.errors import ConfigError, TeacherError
from softlabels.fine_tuning import METRICS, EpochFigures, Rows, TeacherOptions, divide_rows, fit
from softlabels.language_teacher import check_body, fit_config, prepare_texts
from softlabels.pretrained import (
    hash_weights,
    load_image_processor,
    load_tokenizer,
    quiet_transformers,
    reset_tokenizer,
    resolve_pretrained,
    weight_files,
)
from softlabels.scratch import Blank, build_blank, find_blank
from softlabels.students.presets import PRESETS
from softlabels.tasks import AUTO_CLASSES, check_tokenizer, find_task, has_label_names
from softlabels.tokens import Tokenized, resolve_max_length, tokenize
from softlabels.types import IMAGES, NO_LABEL, VECTOR_LABELS, Task

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMAT, VERSION = "softlabels-teacher", 1
# settings that a teacher.json of an earlier softlabels doesn't have
_UNSAID = {"from_scratch": False, "task": "sequence-classification"}


@dataclass(frozen=True)
class Teacher:
    """A model ready to be asked. `label_names` are in the order of its logits, (B, C) or (B, L, C)."""

    model: PreTrainedModel
    reader: PreTrainedTokenizerBase | BaseImageProcessor  # the second where `task` is image-classification
    name: str
    label_names: list[str]
    weights_hash: str  # xxh3-128 (hex) of its safetensors files and config.json
    task: Task = "sequence-classification"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """TeacherError where the teacher reads images."""
        if self.task == IMAGES:
            raise TeacherError(f"{self.name} reads images: it has no tokenizer")
        return cast("PreTrainedTokenizerBase", self.reader)

    @property
    def processor(self) -> BaseImageProcessor:
        """TeacherError where the teacher reads texts."""
        if self.task != IMAGES:
            raise TeacherError(f"{self.name} reads texts: it has no image processor")
        return cast("BaseImageProcessor", self.reader)


@dataclass(frozen=True)
class TeacherReport:
    """What `train_teacher` did. `best_epoch` is the one whose weights were kept."""

    out: Path
    label_names: list[str]
    train_rows: int
    validation_rows: int  # 0: no row could be held out, so the last epoch was kept
    unlabelled_rows: int  # skipped
    truncated_rows: int  # cut to max_length tokens
    max_length: int
    metric: str  # accuracy, or of a language model perplexity: exp of the mean −log q(token) over the held-out targets
    best_epoch: int
    best_score: float | None
    epochs: list[EpochFigures]
    seconds: float
    weights_hash: str
    short_rows: int = 0  # skipped: of a language model, texts without a token to predict
    reused: bool = False  # `out` already held this very teacher, so nothing was trained


# ------------------------------------------------------------------------------------------------------- load


def load_teacher(
    name: str,
    *,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    task: str | None = None,
) -> Teacher:
    """The model `name` (folder or hub name) for `task` (what its config.json says), frozen, in eval mode, in `dtype`.

    TeacherError: not found, not safetensors, code not trusted, no trained head for the task, no names for its classes,
    or no tokenizer (image processor) that fits.
    """
    folder = resolve_pretrained(name, trust_remote_code=trust_remote_code)
    config = _load_config(folder, trust_remote_code)
    found = find_task(config, task, where=folder)
    names = _label_names(config, folder, found) if has_label_names(found) else []
    model = _load_with_head(
        name, folder, config=config, task=found, trust_remote_code=trust_remote_code, dtype=dtype or torch.float32
    )
    if found == IMAGES:
        reader: Any = load_image_processor(folder, trust_remote_code=trust_remote_code)
    else:
        reader = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        check_tokenizer(found, reader)
        _fit_tokenizer(model, reader, folder)
    model.eval().requires_grad_(False).to(_pick_device(device))
    return Teacher(model, reader, name, names, hash_weights(folder), found)


def at_precision(teacher: Teacher, dtype: str) -> torch.autocast:
    """Inside, the teacher computes in float32, or by autocast in `dtype`."""
    kind = getattr(torch, dtype)
    return torch.autocast(teacher.model.device.type, dtype=kind, enabled=kind != torch.float32)


def teacher_task(name: str, task: str | None = None, *, trust_remote_code: bool = False) -> Task:
    """What the model `name` was made for, from its configuration alone."""
    folder = resolve_pretrained(name, trust_remote_code=trust_remote_code)
    return find_task(_load_config(folder, trust_remote_code), task, where=folder)


def _load_with_head(
    name: str, folder: Path, *, config: PretrainedConfig, task: Task, trust_remote_code: bool, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with the trained head of its task; TeacherError where it has none."""
    load = partial(
        _load_model,
        folder,
        config=config,
        task=task,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        new_head=False,
    )
    model, missing = load()
    if task == "sentence-embedding" and missing and all("pooler" in key for key in missing):
        model, missing = load(pooler=False)  # it was never trained: there is none
    if not missing:
        return model
    shown = ", ".join(missing[:3])
    if task == "sequence-classification":
        raise TeacherError(
            f"{name}: this model has no trained classification head ({shown} would be random): "
            f"fine-tune it with softlabels train-teacher, and dump the folder that it writes"
        )
    how = f" with softlabels train-teacher --task {task}" if task in METRICS else ""
    raise TeacherError(
        f"{name}: this model has no trained head for {task} ({shown} would be random): fine-tune it first{how}"
    )


def _load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise TeacherError(f"{folder / 'config.json'} is no model's configuration: {error}") from error


def _label_names(config: PretrainedConfig, folder: Path, task: Task) -> list[str]:
    """The names of the classes or numbers in the order of the logits; TeacherError where there are too few."""
    count = config.num_labels or 0
    if count < (1 if task in VECTOR_LABELS else 2):
        raise TeacherError(
            f"{folder} has {count} output{'s' * (count != 1)}, too few for {task}: is it another --task?"
        )
    named: dict[Any, Any] = config.id2label or {}
    names = [named.get(index) for index in range(count)]
    if None in names or len(set(names)) < len(names):
        raise TeacherError(
            f"{folder / 'config.json'}: id2label must give each of the {count} classes a name of its own"
        )
    return [str(name) for name in names]


def _load_model(
    folder: Path,
    *,
    config: PretrainedConfig,
    task: Task,
    trust_remote_code: bool,
    dtype: torch.dtype,
    new_head: bool,
    pooler: bool = True,
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and what the checkpoint lacks, sorted. `new_head`: the head may have another size."""
    import transformers

    kind = getattr(transformers, AUTO_CLASSES[task])
    more = {} if pooler else {"add_pooling_layer": False}
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=new_head,
                output_loading_info=True,
                **more,
            )
    except Exception as error:  # damaged files, unknown architectures, wrong sizes: each says so in its first line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TeacherError(f"{folder} does not load for {task}: {reason}") from error
    wrong_size = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    missing = sorted({*info["missing_keys"], *wrong_size})
    body = f"{model.base_model_prefix}." if task != "sentence-embedding" else ""
    if body and any(key.startswith(body) for key in wrong_size):
        raise TeacherError(f"{folder}: {wrong_size[0]} has another size than config.json says: the two do not fit")
    if sum(key.startswith(body) for key in missing) > len(model.state_dict()) / 2:
        raise TeacherError(f"{folder}: the weights are not those of a {config.model_type}, as config.json says")
    return model, missing


def _fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Tell the model which token pads; TeacherError where the tokenizer has tokens that the model has not."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and len(tokenizer) > rows:
        raise TeacherError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model's embedding only {rows}: "
            f"they are not of the same model"
        )
    if model.config.pad_token_id is None or model.config.pad_token_id < 0:
        # GPT-2 and its kin classify at the last token that is not padding, so they must know which one is
        model.config.pad_token_id = tokenizer.pad_token_id


def _pick_device(device: str | torch.device | None) -> torch.device:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{chosen}' is asked for, but there is no GPU that torch can use: give 'cpu'")
    return chosen


# ------------------------------------------------------------------------------------------------------ train


def train_teacher(
    corpus: Corpus, *, model: str, out: Path, options: TeacherOptions, validation: Corpus | None = None
) -> TeacherReport:
    """Train `model` (folder or hub name) for `options.task` on the rows of `corpus`, and write a teacher to `out`.

    A classifier learns from the labelled rows; a language model from every text, whatever its label: a masked one by
    BERT's masking, which falls on other tokens in every epoch, see `softlabels.language_teacher`. With
    `options.from_scratch` it starts from random weights, see `softlabels.scratch`.
    The epoch with the best accuracy on `validation` is kept (of equals the one with the lower loss), or the best
    perplexity, at masks that stay the same. Without `validation`, a share of each class of `corpus`, or of its texts,
    is held out. The same call on the same machine gives the same weights; where `out` already holds that teacher,
    nothing is trained. TeacherError and CorpusError say what does not fit.
    """
    names = _class_names(corpus, options)
    beginning = _find_beginning(model, options)
    configuration = _configuration(corpus, names, beginning, options, validation)
    earlier = _earlier(out, configuration)
    if earlier is not None:
        return earlier
    start = time.monotonic()
    device = _pick_device(options.device)
    with torch.random.fork_rng(), _renamed_last(out) as unfinished:
        torch.manual_seed(options.seed)
        network, tokenizer = _prepare_model(beginning, names, options)
        max_length = resolve_max_length(options.max_length, tokenizer, network.config)
        prepare = _prepare_rows if options.task == "sequence-classification" else prepare_texts
        rows = prepare(corpus, validation, tokenizer, max_length=max_length, options=options)
        network.to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` has the wrong type
        epochs, best = fit(network, rows, tokenizer.pad_token_id, options)
        reset_tokenizer(tokenizer)
        with quiet_transformers():
            network.eval().cpu().save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        report = TeacherReport(
            out=out,
            label_names=names,
            train_rows=len(rows.train),
            validation_rows=len(rows.held),
            unlabelled_rows=rows.unlabelled,
            truncated_rows=rows.truncated,
            max_length=rows.max_length,
            metric=METRICS[options.task],
            best_epoch=best.epoch,
            best_score=best.validation_score,
            epochs=epochs,
            seconds=round(time.monotonic() - start, 2),
            weights_hash=hash_weights(unfinished),
            short_rows=rows.short,
        )
        _write_teacher_json(unfinished, model, corpus, configuration, report)
    return report


def _class_names(corpus: Corpus, options: TeacherOptions) -> list[str]:
    """What a classifier is to tell apart, CorpusError where that is too little; of a language model nothing."""
    if options.task != "sequence-classification":
        return []
    check_trainable(corpus)
    return list(corpus.label_names or [])


def _find_beginning(model: str, options: TeacherOptions) -> Path | Blank:
    """The pretrained model's folder, or what a new one is made of; TeacherError where there is neither."""
    if options.from_scratch:
        return find_blank(model, tokenizer=options.tokenizer, options=options.options)
    folder = Path(model).expanduser()
    if model in PRESETS and not folder.exists():
        raise TeacherError(f"'{model}' is a shape, not a trained model: give --from-scratch and --tokenizer with it")
    if (folder / "config.json").is_file() and not weight_files(folder):
        raise TeacherError(f"{folder} has no weights in safetensors: to start from random ones, give --from-scratch")
    return resolve_pretrained(model, trust_remote_code=options.trust_remote_code)


def _prepare_model(
    beginning: Path | Blank, label_names: list[str], options: TeacherOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained model under the head of its task, or a new one, and its tokenizer."""
    if isinstance(beginning, Blank):
        check_tokenizer(options.task, beginning.tokenizer)
        return build_blank(beginning, label_names, task=options.task), beginning.tokenizer
    config = _load_config(beginning, options.trust_remote_code)
    tokenizer = load_tokenizer(beginning, trust_remote_code=options.trust_remote_code)
    check_tokenizer(options.task, tokenizer)
    classifier = options.task == "sequence-classification"
    if classifier:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: index for index, name in enumerate(label_names)}
        config.problem_type = "single_label_classification"
    else:
        fit_config(config, options.task, beginning)
    network, missing = _load_model(
        beginning,
        config=config,
        task=options.task,
        trust_remote_code=options.trust_remote_code,
        dtype=torch.float32,
        new_head=classifier,
    )
    if not classifier:
        check_body(network, missing, beginning)
    _fit_tokenizer(network, tokenizer, beginning)
    return network, tokenizer


def _prepare_rows(
    corpus: Corpus,
    validation: Corpus | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    options: TeacherOptions,
) -> Rows:
    """The labelled rows of both corpora, tokenised; some are held out where there is no validation corpus."""
    names = corpus.label_names or []

    def labelled(source: Corpus) -> Tokenized:
        labels = encode_labels(source.examples, names)
        pairs = [(e, label) for e, label in zip(source.examples, labels, strict=True) if label != NO_LABEL]
        return tokenize(tokenizer, [e for e, _ in pairs], max_length=max_length, labels=[label for _, label in pairs])

    found = labelled(corpus)
    unlabelled = len(corpus.examples) - len(found.examples)
    theirs = None
    if validation is not None:
        theirs = labelled(validation)
        if not theirs.examples:
            raise TeacherError(f"the validation corpus {validation.source} has no labelled row to score the teacher on")
    return replace(divide_rows(found, theirs, options, max_length=max_length), unlabelled=unlabelled)


# ------------------------------------------------------------------------------------------------- the folder


def _configuration(
    corpus: Corpus,
    label_names: list[str],
    beginning: Path | Blank,
    options: TeacherOptions,
    validation: Corpus | None,
) -> dict[str, Any]:
    """What decides the teacher's weights, beside the machine and the versions."""
    other = ("device", "trust_remote_code", "tokenizer", "options")  # the last two are in the model's identity
    settings = {key: value for key, value in asdict(options).items() if key not in other}
    return {
        "model": beginning.identity if isinstance(beginning, Blank) else hash_weights(beginning),
        "corpus": corpus.hash,
        "validation": None if validation is None else validation.hash,
        "label_names": label_names,
        **settings,
    }


def _earlier(out: Path, configuration: dict[str, Any]) -> TeacherReport | None:
    """The report of a teacher of this configuration in `out`; None where `out` is free; else TeacherError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    remedy = "choose another --out, or remove it first"
    try:
        saved = json.loads((out / "teacher.json").read_text(encoding="utf-8"))
        if saved["format"] != FORMAT or saved["version"] != VERSION:
            raise ValueError
        before, report = saved["configuration"], saved["report"]
        differing = [key for key in configuration if before.get(key, _UNSAID.get(key)) != configuration[key]]
        epochs = [EpochFigures(**figures) for figures in report.pop("epochs")]
        found = TeacherReport(**report, out=out, epochs=epochs, reused=True)
        unchanged = not differing and hash_weights(out) == found.weights_hash
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TeacherError(f"{out} is already there and is no teacher of this softlabels: {remedy}") from None
    if differing:
        raise TeacherError(f"{out} holds a teacher that differs in {', '.join(differing)}: {remedy}")
    if not unchanged:
        raise TeacherError(f"{out} holds a teacher whose weights or config were changed since: {remedy}")
    return found


def _write_teacher_json(
    folder: Path, model: str, corpus: Corpus, configuration: dict[str, Any], report: TeacherReport
) -> None:
    """Write teacher.json: what went in, how, and what came out."""
    import transformers

    figures = asdict(report)
    del figures["out"], figures["reused"]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "corpus": {"source": corpus.source, "split": corpus.split, "hash": corpus.hash},
        "configuration": configuration,
        "report": figures,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "teacher.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def _renamed_last(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and is removed when it does not."""
    from safetensors import SafetensorError

    unfinished = out.parent / f".{out.name}.unfinished"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with lock(unfinished):  # a folder that a killed training left is free again, one in use is not
            try:
                for path in unfinished.iterdir():
                    path.unlink()
                yield unfinished
                for path in [*unfinished.iterdir(), unfinished]:
                    sync(path)
                if out.exists():
                    out.rmdir()  # empty, or this fails and says so
                unfinished.rename(out)
                sync(out.parent)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TeacherError(f"the teacher could not be written to {out}: {reason}") from error
