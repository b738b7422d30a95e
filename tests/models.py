"""Small real models and tokenizers for tests: made in a moment, saved and loaded like any pretrained one.

`TEXTS` are sentences of three classes that a tiny model can learn; `save_teacher` writes a teacher's folder.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LABEL_NAMES = ["food", "sport", "weather"]

_FOOD = """
Cook the onions in butter until the sauce turns golden.
The soup needs salt, pepper and a squeeze of lemon.
Knead the dough and bake the bread in a hot oven.
She baked a cake with butter, sugar and cherries.
We cooked fish in olive oil and ate it with bread.
Stir the sauce slowly and add a pinch of salt.
This kitchen bakes the best bread and cake in town.
The recipe asks for flour, sugar and two eggs.
Fry the garlic in oil, then add the tomato sauce.
My grandmother has her own recipe for tomato soup.
Serve the soup hot, with cheese and fresh bread.
Add the flour and the sugar to the melted butter.
Cook the rice with salt and stir in the cheese.
The kitchen smelled of garlic, onions and olive oil.
He roasted a chicken in the oven for dinner.
For dinner she cooked pasta with cheese and garlic.
Pour the dough into a pan and bake it in the oven.
They ate cake with sugar and cream after dinner.
This recipe takes eggs, butter, flour and salt.
Cook the tomato sauce with onions, oil and pepper.
"""
_SPORT = """
The striker scored a goal in the last minute of the match.
Our team lost the final by a single goal.
She won the race and the gold medal.
The keeper saved a goal and the fans cheered.
The coach trains the team five days a week.
The captain of the team missed the next match.
Both players won their match and reached the final.
The coach praised the players after the game.
The team won the league and a silver medal.
The champion won the race in record time.
The players waited for the whistle to start the game.
The fans filled the stadium before the match.
The player scored his first goal of the season.
The club lost three games of the season.
He won the race and set a new record.
The champion lost the final stage of the race.
The home team leads the league by six points.
The fans left the stadium after the lost game.
The captain scored the winning goal for the club.
The coach of the club won a medal as a player.
"""
_WEATHER = """
Heavy rain and wind are expected tomorrow afternoon.
The fog clears before noon and the sun comes out.
Wind and snow closed the mountain roads last night.
It will be sunny and warm in the south tomorrow.
A storm with rain and hail comes from the west.
Temperatures fall below zero during the night.
Clouds from the west bring light rain tonight.
The dry weather ended when the rain came.
Cold wind from the north brings frost tonight.
The storm with heavy rain reached the coast.
Clouds in the morning, then a sunny afternoon.
The storm left snow and frost in the north.
Expect fog in the morning and rain in the afternoon.
Warm and dry weather lasts until Friday.
A mild wind from the south keeps the night warm.
Cold and cloudy weather is expected at the coast.
Rain and fog are likely in the west tonight.
Snow turns to rain as temperatures rise tomorrow.
Dry and sunny weather returns to the south.
The forecast warns of strong wind and heavy snow.
"""
TEXTS: list[tuple[str, str]] = [  # (sentence, label name), the classes in turn
    pair
    for row in zip(
        *(
            [(text, name) for text in block.strip().splitlines()]
            for name, block in zip(LABEL_NAMES, (_FOOD, _SPORT, _WEATHER), strict=True)
        ),
        strict=True,
    )
    for pair in row
]


def tiny_tokenizer(
    texts: Sequence[str] | None = None,
    *,
    kind: Literal["wordpiece", "bpe"] = "wordpiece",
    vocab_size: int = 600,
    max_length: int = 64,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the characters and frequent words of `texts` (by default TEXTS).

    'wordpiece' is shaped like BERT's: [CLS] text [SEP] pair [SEP], with token types. 'bpe' is shaped like
    GPT-2's: bytes, no special token but <|endoftext|>, and no pad token. The same texts give the same
    tokenizer, which the trainers of `tokenizers` do not promise.
    """
    lines = [text for text, _ in TEXTS] if texts is None else list(texts)
    if kind == "bpe":
        return _byte_tokenizer(lines, vocab_size=vocab_size, max_length=max_length)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = _frequent(piece for line in lines for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)))
    letters = sorted({*string.ascii_lowercase, *string.digits, *"".join(words)})
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: index for index, piece in enumerate(list(dict.fromkeys(pieces))[:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _byte_tokenizer(lines: list[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Bytes that merge to the frequent words from their left end: 's' + 'n', 'sn' + 'o', 'sno' + 'w'."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = dict.fromkeys(["<|endoftext|>", *sorted(splitter.alphabet())])
    merges: dict[tuple[str, str], None] = {}
    for word in _frequent(piece for line in lines for piece, _ in splitter.pre_tokenize_str(line)):
        for end in range(1, len(word)):
            if len(pieces) < vocab_size:
                merges[word[:end], word[end]] = None
                pieces[word[: end + 1]] = None
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def _frequent(words: Iterable[str]) -> list[str]:
    """The distinct words, the most frequent first; of equals in the order of the alphabet."""
    counts = Counter(words)
    return sorted(counts, key=lambda word: (-counts[word], word))


def tiny_classifier(
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_labels: int = 3,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    seed: int = 0,
    label_names: Sequence[str] | None = None,
) -> BertForSequenceClassification:
    """A BERT classifier for `tokenizer`, in eval mode, its weights drawn from `seed`.

    The classes are called `label_names`: by default LABEL_NAMES where there are three, else LABEL_0, LABEL_1,
    …
    """
    if label_names is None:
        label_names = LABEL_NAMES if num_labels == 3 else [f"LABEL_{index}" for index in range(num_labels)]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,  # wider than BERT's, so that different texts get clearly different logits
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()


def tiny_gpt2(
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_labels: int = 3,
    layers: int = 2,
    hidden: int = 32,
    seed: int = 0,
) -> GPT2ForSequenceClassification:
    """A GPT-2 classifier for a 'bpe' tokenizer, in eval mode, its config without a pad token like GPT-2's."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        n_positions=tokenizer.model_max_length,
        initializer_range=0.1,
        id2label={index: f"LABEL_{index}" for index in range(num_labels)},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2ForSequenceClassification(config).eval()


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write `model` and `tokenizer` (by default a tiny one) to `folder`, as save_pretrained does."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def save_teacher(
    folder: Path,
    *,
    texts: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    num_labels: int = 3,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    seed: int = 0,
    max_length: int = 64,
) -> Path:
    """Write a teacher's folder (untrained, but complete: head, tokenizer, label names) and return it."""
    tokenizer = tiny_tokenizer(texts, max_length=max_length)
    model = tiny_classifier(
        tokenizer,
        num_labels=num_labels if label_names is None else len(label_names),
        layers=layers,
        hidden=hidden,
        heads=heads,
        seed=seed,
        label_names=label_names,
    )
    return save_model(folder, model, tokenizer)
