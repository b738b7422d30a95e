"""Language models as teachers that are trained here: texts in, rows with tokens to predict out.

A masked model learns by BERT's masking: 15 % of the tokens, of which 80 % become the mask token, 10 % a random one and
10 % stay (Devlin et al. 2019, section 3.1), drawn anew for every epoch (as in Liu et al. 2019, section 4.1). The masks
of held-out rows never change, so that epochs can be compared. A causal model is asked for every next token. A text is
one row, cut to the largest length: texts are not joined.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from softlabels.config import Masking, TeachableTask
from softlabels.corpus import Corpus
from softlabels.errors import CorpusError, TeacherError
from softlabels.fine_tuning import Rows, TeacherOptions, divide_rows
from softlabels.tasks import TaskLabels, mask_tokens, tokenize_task
from softlabels.tokens import Tokenized, count_row_targets
from softlabels.types import NO_LABEL, TokenizedExample

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = 0  # the epoch, so to say, whose masks the held-out rows have; training counts from 1


def fit_config(config: PretrainedConfig, task: TeachableTask, folder: Path) -> None:
    """For causal-lm have the model look back only: BERT and its kin would see the tokens that they are asked for.

    TeacherError for an encoder-decoder model.
    """
    if config.is_encoder_decoder:
        raise TeacherError(
            f"{folder} is a {config.model_type}, an encoder with a decoder, which is not trained here for {task}: give "
            f"a model of one part, such as a BERT or a GPT-2"
        )
    if task == "causal-lm" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True


def check_body(network: PreTrainedModel, missing: list[str], folder: Path) -> None:
    """TeacherError where anything but the head of `network` is `missing` from the weights in `folder`."""
    body = [key for key in missing if key.startswith(f"{network.base_model_prefix}.")]
    if body:
        raise TeacherError(f"the weights in {folder} are not whole: they lack {', '.join(body[:3])}; copy them again")


def prepare_texts(
    corpus: Corpus,
    validation: Corpus | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    options: TeacherOptions,
) -> Rows:
    """Every text of both corpora, tokenised, with its labels; some are held out where there is no validation corpus.

    Texts without a token to predict are left out; CorpusError where a corpus has no others.
    """

    def texts(source: Corpus) -> Tokenized:
        found = tokenize_task(
            options.task,
            tokenizer,
            source.examples,
            max_length=max_length,
            labels=TaskLabels([NO_LABEL] * len(source.examples)),
            masking=masking_of(options.seed, HELD_OUT),
        )
        rows = [row for row in found.examples if count_row_targets(row)]
        if not rows:
            raise CorpusError(f"corpus {source.source} has no token to predict: give longer texts")
        return Tokenized(rows, found.truncated)

    def anew(row: TokenizedExample, epoch: int) -> TokenizedExample:
        return mask_tokens(unmask(row), tokenizer, masking_of(options.seed, epoch))

    found = texts(corpus)
    short = len(corpus.examples) - len(found.examples)
    theirs = None if validation is None else texts(validation)
    rows = divide_rows(found, theirs, options, max_length=max_length)
    return replace(rows, short=short, anew=anew if options.task == "masked-lm" else None)


def unmask(row: TokenizedExample) -> TokenizedExample:
    """`row` as it was before `mask_tokens`."""
    assert row.labels is not None
    return replace(row, input_ids=np.where(row.labels == NO_LABEL, row.input_ids, row.labels), labels=None)


@cache
def masking_of(seed: int, epoch: int) -> Masking:
    """BERT's masking, its draws those of `epoch` of a training with `seed`."""
    return Masking(seed=int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
